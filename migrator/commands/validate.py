"""`migrator validate`: a sharded checkpoint proven on real processes."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import click

from migrator import console
from migrator.needs import need_runtime
from plans.errors import MismatchError
from runtime.started import leave
from runtime.wording import counted

if TYPE_CHECKING:
    from runtime.structure import Mismatch
    from runtime.validation_values import ValidationRequest, ValidationResult

__all__ = ["command"]


@click.command("validate")
@click.argument("source")
@click.option("--tp", default=1, show_default=True, help="Ranks of the tensor parallel axis.")
@click.option(
    "--reference",
    help="The checkpoint that SOURCE was laid out from; without it the unsharded model is put together from SOURCE.",
)
@click.option(
    "--tolerance",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=1e-5,
    show_default=True,
    help="Of the logits in float32, relative to the largest.",
)
@click.option("--timeout", default=1800.0, show_default=True, metavar="SECONDS", help="For the workers.")
@click.option("--format", "form", type=click.Choice(["human", "json"]), default="human", help="How to print it.")
def command(source: str, tp: int, reference: str | None, tolerance: float, timeout: float, form: str) -> int:
    """Prove SOURCE, a folder of rank files: one process for each rank loads its own and runs the model.

    Every planned parameter must be sharded as planned and every other one whole, the bytes must be those that were
    written, and the logits must equal the unsharded model's. Runs under torchrun too. SOURCE and the reference may be
    hf://owner/name[@revision].
    """
    need_runtime()
    from plans.mesh import Mesh
    from runtime.hub import local_folder
    from runtime.joined import in_worker
    from runtime.validation_values import ValidationRequest, ValidationResult
    from runtime.worker import run_validation, take_part

    folder, compared = local_folder(source), local_folder(reference) if reference else None
    request = ValidationRequest(folder, Mesh(tp=tp), compared, tolerance=tolerance, timeout=timeout)
    failure: MismatchError | None = None
    if not in_worker():
        # As Ctrl-C does, and unlike the default, this leaves neither workers nor folders behind.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        result = take_part(request) if in_worker() else run_validation(request)
    except MismatchError as error:
        failure = error
        result = ValidationResult.refuted(request.mesh.world_size, error.message)
    if os.environ.get("RANK", "0") == "0":
        _report(request, result, failure, form)
    code = 0 if result.ok else 1
    if in_worker():
        leave(code)
    return code


def _report(request: ValidationRequest, result: ValidationResult, failure: MismatchError | None, form: str) -> None:
    if form == "json":
        more = {"error": failure.message, "hint": failure.hint} if failure else {}
        console.emit_json(result.to_json() | more)
    elif failure is None:
        _show(request.folder, result)
    if failure is not None:
        console.error(failure)
    if request.reference and result.forward and not result.forward.ok and result.forward.reason is None:
        console.say(f"hint: {request.reference} may be another checkpoint than the one that was laid out")


def _show(source: Path, result: ValidationResult) -> None:
    structure, content, forward = result.structure, result.content, result.forward
    _line("structure", not structure.mismatches, _checked(structure.checked, result.world_size))
    _list(structure.mismatches)
    if content is not None:
        _line("content", not content.mismatches, counted(content.checked, "digest"))
        _list(content.mismatches)
    if forward is not None:
        worst = f"{forward.max_abs_diff:.2e}, of {forward.max_abs_reference:.2e}"
        _line("forward", forward.ok, forward.reason or f"largest difference of {forward.compared} {worst}")
    for name, reason in result.skipped.items():
        console.emit(f"{name:<10} skipped  {reason}")
    console.emit(f"{source}: {'proven' if result.ok else 'not as it must be'}")


def _checked(tensors: int, world_size: int) -> str:
    return f"{counted(tensors, 'tensor')} on {'1 rank' if world_size == 1 else f'each of {world_size} ranks'}"


def _line(name: str, ok: bool, text: str) -> None:
    console.emit(f"{name:<10} {'ok' if ok else 'WRONG':<8} {text}")


def _list(mismatches: tuple[Mismatch, ...]) -> None:
    for mismatch in mismatches:
        where = "" if mismatch.rank is None else f" on rank {mismatch.rank}"
        console.emit(f"{'':<10} {mismatch.name}{where}: expected {mismatch.expected}, found {mismatch.found}")
