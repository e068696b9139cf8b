"""`migrator validate`: a checkpoint of whatever layout proven on real processes."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import click

from migrator import console
from migrator.mesh_options import mesh_options
from migrator.needs import need_runtime
from migrator.report_option import report_option
from migrator.values import SECONDS, not_empty
from runtime.processes.started import leave

if TYPE_CHECKING:
    from migrator.report.values import Report
    from plans.mesh import Mode
    from runtime.validation.request import Device, ValidationRequest
    from runtime.validation.values import ValidationResult

__all__ = ["command", "page_of"]


@click.command("validate")
@click.argument("source", callback=not_empty)
@mesh_options
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda", "auto"]),
    default="auto",
    show_default=True,
    help="Where ranks compute; auto takes GPUs where each rank can have one.",
)
@click.option(
    "--reference",
    callback=not_empty,
    help="The checkpoint that SOURCE was laid out from; without it the unsharded model is put together from SOURCE.",
)
@click.option(
    "--tolerance",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=1e-5,
    show_default=True,
    help="Of outputs in float32, relative to the largest; gradients may differ ten times as much.",
)
@click.option("--timeout", type=SECONDS, default=1800.0, show_default=True, metavar="SECONDS", help="For the workers.")
@click.option("--format", "form", type=click.Choice(["human", "json"]), default="human", help="How to print it.")
@report_option
def command(
    source: str,
    tp: int,
    ep: int,
    fsdp: int,
    mode: Mode | None,
    device: Device,
    reference: str | None,
    tolerance: float,
    timeout: float,
    form: str,
    report: Path | None,
) -> int:
    """Prove the checkpoint SOURCE on a mesh: one process for each rank loads its part and runs the model.

    Every planned parameter must be sharded as planned and every other one whole; the bytes that ranks hold must be
    those that were written, and the reference's; config.json must say to compute what the reference's says; outputs,
    gradients and greedy tokens must equal the unsharded model's. The mesh is the one that SOURCE was laid out for,
    where it says so. Runs under torchrun too, on several machines that all see SOURCE. SOURCE and the reference may
    have any layout, and be hf://owner/name[@revision].
    """
    need_runtime()
    from runtime.hub import local_folder
    from runtime.processes.started import in_worker
    from runtime.validation.request import ValidationRequest, wanted_mesh

    folder, compared = local_folder(source), local_folder(reference) if reference else None
    mesh, chosen = wanted_mesh(folder, _given({"tp": tp, "ep": ep, "fsdp": fsdp}), mode)
    request = ValidationRequest(folder, mesh, chosen, compared, device, tolerance, timeout)
    result = _result(request)
    if os.environ.get("RANK", "0") == "0":
        _tell(request, result, form, report)
    code = 0 if result.ok else 1
    if in_worker():
        leave(code)
    return code


def _given(sizes: dict[str, int]) -> dict[str, int]:
    """Return the sizes that are no defaults, but were asked for."""
    context = click.get_current_context()
    default = click.core.ParameterSource.DEFAULT
    return {axis: size for axis, size in sizes.items() if context.get_parameter_source(axis) != default}


def _result(request: ValidationRequest) -> ValidationResult:
    from runtime.processes.started import in_worker
    from runtime.validation.worker import run_validation, take_part

    if in_worker():
        return take_part(request)
    # As Ctrl-C does, and unlike the default, this leaves neither workers nor folders behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    return run_validation(request)


def _tell(request: ValidationRequest, result: ValidationResult, form: str, report: Path | None) -> None:
    from migrator.validation_text import hint, show

    if form == "json":
        console.emit_json(result.to_json())
    else:
        show(request.folder, result)
    if (text := hint(request, result)) is not None:
        console.say(f"hint: {text}")
    if report is not None:
        from migrator.report.page import write_report

        write_report(page_of(request, result), report)
        console.say(f"wrote {report}")


def page_of(request: ValidationRequest, result: ValidationResult) -> Report:
    """Return the report of a validation, with what the checkpoint holds as far as it can be read."""
    from migrator.report.from_validation import validation_report
    from plans.errors import MigratorError
    from runtime.checkpoint.layout import layout_of
    from runtime.inspecting.inspection import inspect_checkpoint
    from runtime.inspecting.values import Inspection
    from runtime.validation.request import recorded

    try:
        planned = None if recorded(request.folder) else request.mesh
        found = inspect_checkpoint(request.folder, planned, request.mode)
    except MigratorError:
        # What is wrong with it is among the mismatches; the rest of the page is what could not be read.
        found = Inspection(request.folder, layout_of(request.folder), "")
    return validation_report(found, result.to_json())
