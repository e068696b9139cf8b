"""A job's resharding: it replaces its own earlier result, keeps one that is already right, and touches no other."""

from __future__ import annotations

import hashlib
import os
from contextlib import nullcontext
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from migrator import actions
from migrator.formats.reshard import estimate_as_json, result_as_json
from migrator.jobs.files import is_regular_file, list_files, raise_destination_errors
from migrator.jobs.interruption import interruptible
from migrator.jobs.results import ActionOutcome, StepContext
from migrator.options.external import ExternalOptions, read_external_settings
from migrator.report.from_reshard import build_reshard_report
from migrator.report.page import render_report
from migrator.settings import Reshard, Verify
from plans.errors import DestinationError, MigratorError
from plans.text import pluralize
from runtime.checkpoint.copying.commit import check_destination, convert_write_errors
from runtime.checkpoint.files.file_names import MANIFEST
from runtime.checkpoint.manifest import Manifest, read_manifest
from runtime.checkpoint.resharding.plan import find_block_size, plan_block_sharing
from runtime.hub import check_repository, push

if TYPE_CHECKING:
    from runtime.checkpoint.copying.copy_plan import OutputFile
    from runtime.checkpoint.resharding.plan import ReshardPlan

__all__ = ["estimate_step", "run_step"]


def run_step(step: Reshard, context: StepContext) -> ActionOutcome:
    """Reshard a checkpoint, continuing a run that was stopped before.

    Args:
        step: the step's settings.
        context: what the job knows of the destination, and whom to tell of the progress.

    Raises:
        DestinationError: the destination holds something that this job did not write.
        MigratorError: the source cannot be read, or cannot be resharded as asked.
    """
    with interruptible():
        if step.push_to is not None:
            check_repository(step.push_to)
        plan = actions.plan_reshard(step, read_external_settings(step, step.source))
        is_kept = not context.is_own_output and os.path.lexists(step.destination) and _can_keep(plan, step, context)
    outcome = _keep_result(plan, step) if is_kept else _write_result(plan, step, context)
    if step.push_to is None:
        return outcome
    with interruptible():
        address = push(step.destination, step.push_to, quiet=True)
    return replace(
        outcome, summary=f"{outcome.summary}, pushed to {address}", result={**outcome.result, "pushed": address}
    )


def estimate_step(step: Reshard, *, is_own_output: bool) -> dict[str, object]:
    """Estimate what a reshard would take, in JSON; nothing stays written.

    Args:
        step: the step's settings.
        is_own_output: whether the destination holds nothing but what this job wrote there, unchanged.

    Raises:
        MigratorError: it cannot be planned, or the destination holds something that this job did not write.
    """
    plan = actions.plan_reshard(step, read_external_settings(step, step.source))
    exists = os.path.lexists(step.destination)
    is_kept = exists and not is_own_output and _has_expected_files(plan, step.destination)
    if exists and not is_kept:
        check_destination(step.destination, overwrite=step.overwrite or is_own_output, names=plan.file_names)
    parent = next(folder for folder in step.destination.parents if os.path.lexists(folder))
    if not parent.is_dir():
        raise DestinationError(f"{parent}: not a folder", hint="name another destination", path=str(parent))
    # The folders above the destination may have to be made yet; the estimate needs one that exists.
    estimate = actions.estimate_reshard(plan, replace(step, destination=parent / step.destination.name))
    return {**estimate_as_json(plan, estimate), "there_already": is_kept}


def _write_result(plan: ReshardPlan, step: Reshard, context: StepContext) -> ActionOutcome:
    with raise_destination_errors(step.destination):
        step.destination.parent.mkdir(parents=True, exist_ok=True)
    settings = replace(step, overwrite=step.overwrite or context.is_own_output)
    result = actions.reshard(plan, settings, context.progress, context.notify)
    assert result is not None  # A job runs on one process.
    summary = f"{_describe_tensors(plan)}, {result.bytes_written:,} bytes"
    return ActionOutcome(0, summary, result_as_json(plan, result), render_report(build_reshard_report(plan, result)))


def _keep_result(plan: ReshardPlan, step: Reshard) -> ActionOutcome:
    result = {"destination": str(step.destination), "files": sorted(plan.file_names), "kept": True}
    page = render_report(build_reshard_report(plan))
    return ActionOutcome(0, f"{_describe_tensors(plan)}, there already", result, page)


def _describe_tensors(plan: ReshardPlan) -> str:
    return f"{pluralize(len(plan.checkpoint.tensors), 'tensor')} in {pluralize(len(plan.output.files), 'file')}"


def _can_keep(plan: ReshardPlan, step: Reshard, context: StepContext) -> bool:
    """Return whether the destination already holds exactly the planned result, as after a kill past the commit."""
    if not _has_expected_files(plan, step.destination):
        return False
    context.notify(f"note: {step.destination} is there already, and is compared with {plan.checkpoint.folder}")
    external = {setting.name: getattr(step, setting.name) for setting in fields(ExternalOptions)}
    comparison = Verify(step.source, str(step.destination), step.max_memory, **external)
    return actions.verify(comparison, nullcontext(context.progress)).ok


def _has_expected_files(plan: ReshardPlan, folder: Path) -> bool:
    """Return whether a folder holds what would be written; the bytes of tensors are not read."""
    files = {path.relative_to(folder).as_posix(): path for path in list_files(folder)}
    if folder.is_symlink() or files.keys() != plan.file_names or not all(map(is_regular_file, files.values())):
        return False
    with convert_write_errors(folder):
        plan = plan_block_sharing(plan, find_block_size(plan, folder))
        return _has_side_files(plan, folder) and all(
            _has_fixed_bytes(folder / file.name, file) for file in plan.output.files
        )


def _has_side_files(plan: ReshardPlan, folder: Path) -> bool:
    """Return whether the files without tensors are those that would be written."""
    return (
        all((folder / name).read_bytes() == text for name, text in plan.output.extra_files.items())
        and all(
            _digest_file(folder / name) == _digest_file(plan.checkpoint.folder / name)
            for name in plan.checkpoint.side_files.copied
        )
        and (plan.output.manifest is None or _has_equal_manifest(plan.output.manifest, folder))
    )


def _has_fixed_bytes(path: Path, file: OutputFile) -> bool:
    """Return whether a file with tensors has the planned size, header and padding."""
    with path.open("rb") as stream:
        is_fixed = all(
            os.pread(stream.fileno(), len(content), offset) == content for offset, content in file.fixed_bytes.items()
        )
        return is_fixed and os.fstat(stream.fileno()).st_size == file.size


def _has_equal_manifest(planned: Manifest, folder: Path) -> bool:
    """Return whether a folder's manifest is the planned one but for its digests."""
    try:
        manifest = read_manifest(folder)
    except MigratorError:  # It cannot be the planned one, which can be read.
        return False
    digests = {name: entry.digest for name, entry in manifest.tensors.items()} | dict(manifest.optimizer)
    if planned.tensors.keys() != manifest.tensors.keys() or planned.optimizer.keys() != manifest.optimizer.keys():
        return False
    return planned.with_digests(digests).to_bytes() == (folder / MANIFEST).read_bytes()


def _digest_file(path: Path) -> bytes:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()
