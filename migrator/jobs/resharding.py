"""A job's resharding: its own earlier result is replaced, one that is right already is kept, no other is touched."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from migrator.commands.reshard import estimate_as_json, result_as_json
from migrator.jobs.cache_key import locate_checkpoint
from migrator.jobs.files import is_regular_file, list_files, raise_destination_errors
from migrator.jobs.interruption import interruptible
from migrator.jobs.results import ActionOutcome, StepContext
from migrator.jobs.steps import Reshard
from migrator.options.common import build_mesh
from migrator.options.external import read_external_settings
from migrator.report.from_reshard import build_reshard_report
from migrator.report.page import render_report
from plans.errors import DestinationError, MigratorError
from plans.gc_paused import gc_paused
from plans.text import pluralize
from runtime.checkpoint.copying.commit import check_destination, convert_write_errors
from runtime.checkpoint.ranks.manifest import read_manifest
from runtime.checkpoint.record import MANIFEST, Manifest
from runtime.checkpoint.resharding.estimate import estimate
from runtime.checkpoint.resharding.plan import plan_reshard
from runtime.checkpoint.resharding.reflink import find_block_size, plan_block_sharing
from runtime.checkpoint.resharding.target import ReshardTarget
from runtime.checkpoint.verifying.verify import verify
from runtime.hub import check_repository, push

if TYPE_CHECKING:
    from runtime.checkpoint.copying.output_file import OutputFile
    from runtime.checkpoint.external.source import ExternalSettings
    from runtime.checkpoint.resharding.plan import ReshardPlan

__all__ = ["can_reuse_destination", "estimate_reshard", "has_expected_files", "run_reshard"]


def can_reuse_destination(
    plan: ReshardPlan, external: ExternalSettings | None, folder: Path, max_memory: int, context: StepContext
) -> bool:
    """Return whether what lies at a destination is just what would be written, as where a run was killed after it.

    Args:
        plan: of what would be written.
        external: how to read its source, where that is made of another stack's rank files.
        folder: that it would be written to.
        max_memory: bytes that reading may allocate.
        context: told how far it is.
    """
    if not has_expected_files(plan, folder):
        return False
    context.notify(f"note: {folder} is there already, and is compared with {plan.checkpoint.folder}")
    return verify(
        plan.checkpoint.folder, folder, max_memory=max_memory, progress=context.progress, external=external
    ).ok


def has_expected_files(plan: ReshardPlan, folder: Path) -> bool:
    """Return whether a folder holds all that would be written but for the bytes of tensors, which are not read."""
    here = {path.relative_to(folder).as_posix(): path for path in list_files(folder)}
    if folder.is_symlink() or here.keys() != plan.file_names or not all(map(is_regular_file, here.values())):
        return False
    with convert_write_errors(folder):
        plan = plan_block_sharing(plan, find_block_size(plan, folder))
        return _has_side_files(plan, folder) and all(
            _has_fixed_bytes(folder / file.name, file) for file in plan.output.files
        )


def _has_side_files(plan: ReshardPlan, folder: Path) -> bool:
    """Return whether all files without tensors are there as they would be written."""
    return (
        all((folder / name).read_bytes() == text for name, text in plan.output.extra_files.items())
        and all(
            _digest_file(folder / name) == _digest_file(plan.checkpoint.folder / name)
            for name in plan.checkpoint.side_files.copied
        )
        and (plan.output.manifest is None or _has_equal_manifest(plan.output.manifest, folder))
    )


def _has_fixed_bytes(path: Path, file: OutputFile) -> bool:
    """Return whether a file with tensors has the size and all bytes that no tensor brings."""
    with path.open("rb") as stream:
        is_fixed = all(
            os.pread(stream.fileno(), len(content), offset) == content for offset, content in file.fixed_bytes.items()
        )
        return is_fixed and os.fstat(stream.fileno()).st_size == file.size


def _has_equal_manifest(planned: Manifest, folder: Path) -> bool:
    """Return whether a folder's manifest is the planned one, with digests of its own."""
    try:
        found = read_manifest(folder)
    except MigratorError:  # It cannot be the planned one, which can be read.
        return False
    digests = {name: entry.digest for name, entry in found.tensors.items()} | dict(found.optimizer)
    if planned.tensors.keys() != found.tensors.keys() or planned.optimizer.keys() != found.optimizer.keys():
        return False
    return planned.with_digests(digests).to_bytes() == (folder / MANIFEST).read_bytes()


def _digest_file(path: Path) -> bytes:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()


_MIB = 2**20


def run_reshard(step: Reshard, context: StepContext) -> ActionOutcome:
    """Bring a checkpoint to its new layout; a run that was stopped before is gone on with.

    Raises:
        DestinationError: something else lies at the destination.
        MigratorError: as `plan_reshard` and `execute_reshard`.
    """
    overwrites = step.overwrite or context.is_own_output
    with interruptible():
        if step.push_to is not None:
            check_repository(step.push_to)
        foreign = read_external_settings(step, step.source)
        plan = _plan_step(step, foreign)
        is_others = not context.is_own_output and os.path.lexists(step.destination)
        is_there = is_others and can_reuse_destination(plan, foreign, step.destination, step.max_memory * _MIB, context)
    answer = _keep_existing(plan, step) if is_there else _write_result(plan, step, context, overwrites=overwrites)
    if step.push_to is None:
        return answer
    with interruptible():
        address = push(step.destination, step.push_to, quiet=True)
    said = f"{answer.summary}, pushed to {address}"
    return ActionOutcome(answer.code, said, {**answer.result, "pushed": address}, answer.page)


def estimate_reshard(step: Reshard, *, is_own_output: bool) -> dict[str, object]:
    """Return what a reshard would take, in JSON; nothing stays written.

    Raises:
        MigratorError: it cannot be planned, or its destination is taken.
    """
    plan = _plan_step(step, read_external_settings(step, step.source))
    is_there = not is_own_output and os.path.lexists(step.destination) and has_expected_files(plan, step.destination)
    if os.path.lexists(step.destination) and not is_there:
        check_destination(step.destination, overwrite=step.overwrite or is_own_output, names=plan.file_names)
    above = next(folder for folder in step.destination.parents if os.path.lexists(folder))
    if not above.is_dir():
        raise DestinationError(f"{above}: not a folder", hint="name another destination", path=str(above))
    found = estimate(plan, above / step.destination.name, step.max_memory * _MIB)
    return {**estimate_as_json(plan, found), "there_already": is_there}


def _plan_step(step: Reshard, external: ExternalSettings | None) -> ReshardPlan:
    mesh, mode = build_mesh(step.tp, step.ep, step.fsdp, step.mode)
    layout = step.layout or ("dcp" if mesh.world_size > 1 else "hf")
    with gc_paused():
        target = ReshardTarget(layout, mesh, mode, step.experts, step.optimizer)
        return plan_reshard(locate_checkpoint(step.source), target=target, external=external)


def _write_result(plan: ReshardPlan, step: Reshard, context: StepContext, *, overwrites: bool) -> ActionOutcome:
    with raise_destination_errors(step.destination):
        step.destination.parent.mkdir(parents=True, exist_ok=True)
    result = plan.execute(
        step.destination, context.progress, step.max_memory * _MIB, overwrite=overwrites, say=context.notify
    )
    said = f"{_describe_tensors(plan)}, {result.bytes_written:,} bytes"
    return ActionOutcome(0, said, result_as_json(plan, result), render_report(build_reshard_report(plan, result)))


def _keep_existing(plan: ReshardPlan, step: Reshard) -> ActionOutcome:
    result = {"destination": str(step.destination), "files": sorted(plan.file_names), "kept": True}
    return ActionOutcome(
        0, f"{_describe_tensors(plan)}, there already", result, render_report(build_reshard_report(plan))
    )


def _describe_tensors(plan: ReshardPlan) -> str:
    return f"{pluralize(len(plan.checkpoint.tensors), 'tensor')} in {pluralize(len(plan.output.files), 'file')}"
