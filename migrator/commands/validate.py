"""`migrator validate`: a checkpoint of whatever layout proven on real processes."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import click

from migrator import console
from migrator.mesh_options import mesh_options
from migrator.needs import require_runtime
from migrator.report_option import report_option
from migrator.values import SECONDS, reject_empty
from runtime.processes.started import exit_now

if TYPE_CHECKING:
    from migrator.report.values import Report
    from plans.mesh import Mode
    from runtime.validation.request import Device, ValidationRequest
    from runtime.validation.values import ValidationResult

__all__ = ["build_report", "command"]


@click.command("validate")
@click.argument("source", callback=reject_empty)
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
    callback=reject_empty,
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
    require_runtime()
    from runtime.hub import resolve_folder
    from runtime.processes.started import is_worker_process
    from runtime.validation.request import ValidationRequest, resolve_mesh

    folder, compared = resolve_folder(source), resolve_folder(reference) if reference else None
    mesh, chosen = resolve_mesh(folder, _read_explicit_sizes({"tp": tp, "ep": ep, "fsdp": fsdp}), mode)
    request = ValidationRequest(folder, mesh, chosen, compared, device, tolerance, timeout)
    result = _validate(request)
    if os.environ.get("RANK", "0") == "0":
        _show_and_save(request, result, form, report)
    code = 0 if result.ok else 1
    if is_worker_process():
        exit_now(code)
    return code


def _read_explicit_sizes(sizes: dict[str, int]) -> dict[str, int]:
    """Return the sizes that are no defaults, but were asked for."""
    context = click.get_current_context()
    default = click.core.ParameterSource.DEFAULT
    return {axis: size for axis, size in sizes.items() if context.get_parameter_source(axis) != default}


def _validate(request: ValidationRequest) -> ValidationResult:
    from runtime.processes.started import is_worker_process
    from runtime.validation.worker import run_validation, validate_as_rank

    if is_worker_process():
        return validate_as_rank(request)
    # As Ctrl-C does, and unlike the default, this leaves neither workers nor folders behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    return run_validation(request)


def _show_and_save(request: ValidationRequest, result: ValidationResult, form: str, report: Path | None) -> None:
    from migrator.validation_text import explain_failure, show_result

    if form == "json":
        console.emit_json(result.to_json())
    else:
        show_result(request.folder, result)
    if (text := explain_failure(request, result)) is not None:
        console.say(f"hint: {text}")
    if report is not None:
        from migrator.report.page import write_report

        write_report(build_report(request, result), report)
        console.say(f"wrote {report}")


def build_report(request: ValidationRequest, result: ValidationResult) -> Report:
    """Return the report of a validation, with what the checkpoint holds as far as it can be read."""
    from migrator.report.from_validation import build_validation_report
    from plans.errors import MigratorError
    from runtime.checkpoint.layout import detect_layout
    from runtime.inspecting.inspection import inspect_checkpoint
    from runtime.inspecting.values import Inspection
    from runtime.validation.request import find_manifest

    try:
        planned = None if find_manifest(request.folder) else request.mesh
        found = inspect_checkpoint(request.folder, planned, request.mode)
    except MigratorError:
        # What is wrong with it is among the mismatches; the rest of the page is what could not be read.
        found = Inspection(request.folder, detect_layout(request.folder), "")
    return build_validation_report(found, result.to_json())
