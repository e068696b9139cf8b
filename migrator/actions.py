"""What commands and jobs both do: each action takes frozen settings and returns a result; none of them prints."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from migrator.exit_codes import ExitCode, of_findings
from migrator.options.external import ExternalOptions, read_external_settings
from migrator.options.source import ProjectRequest, read_requests
from migrator.settings import Check, Reshard, Rewrite, Validate, Verify
from plans.errors import UsageError
from plans.gc_paused import gc_paused
from plans.mesh import AXES, Mesh

if TYPE_CHECKING:
    from codemods.tree.outcome import Outcome
    from migrator.formats.report import SourceReport
    from runtime.checkpoint.copying.copy import Progress
    from runtime.checkpoint.external.source import SourceSettings
    from runtime.checkpoint.resharding.estimate import Estimate
    from runtime.checkpoint.resharding.execute import ReshardResult
    from runtime.checkpoint.resharding.plan import ReshardPlan
    from runtime.checkpoint.verifying.differences import Verification
    from runtime.validation.request import ValidationRequest
    from runtime.validation.results import ValidationResult

__all__ = [
    "Validation",
    "check",
    "compute_check_exit_code",
    "compute_rewrite_exit_code",
    "estimate_reshard",
    "is_finished",
    "plan_reshard",
    "reshard",
    "rewrite",
    "validate",
    "verify",
]

_MIB = 2**20


def rewrite(settings: Rewrite, *, changed_only: bool = False, base_ref: str | None = None) -> SourceReport:
    """Compute all rewrites, and write them if `in_place` is set and no proof fails.

    Args:
        settings: what to rewrite.
        changed_only: restrict the rewrite to models with a file changed since `base_ref`.
        base_ref: the git revision that `changed_only` compares with, None for the default.

    Raises:
        UsageError: the settings or the project's configuration are not valid.
    """
    from codemods.rewriting.migrate import plan_rewrites
    from codemods.rewriting.proof import verify_outcome
    from codemods.rewriting.write import write_changes
    from codemods.tree.outcome import merge_outcomes
    from codemods.tree.selection import Suppressions
    from migrator.formats.report import build_pending_report, build_written_report

    requests = _read_requests(settings, changed_only, base_ref)
    outcome = merge_outcomes(
        [
            plan_rewrites(request.paths, Suppressions(request.selection), request.target, request.source)
            for request in requests
        ]
    )
    problems = (
        verify_outcome(outcome, [path for request in requests for path in request.paths]) if settings.verify else ()
    )
    outcome = replace(outcome, errors=(*outcome.errors, *problems))
    if problems or not settings.in_place:
        return build_pending_report(outcome)
    return build_written_report(outcome, write_changes(outcome.changes))


def compute_rewrite_exit_code(report: SourceReport) -> ExitCode:
    """Return the exit code of a rewrite; differences from the converter's output are found, other errors failures."""
    return of_findings(False, report.errors)


def check(settings: Check, *, changed_only: bool = False, base_ref: str | None = None) -> SourceReport:
    """Find pending rewrites and plan defects.

    Args:
        settings: what to check.
        changed_only: see `rewrite`.
        base_ref: see `rewrite`.

    Raises:
        UsageError: see `rewrite`.
    """
    from codemods.tree.outcome import merge_outcomes
    from migrator.formats.report import build_pending_report

    requests = _read_requests(settings, changed_only, base_ref)
    return build_pending_report(merge_outcomes([_check_project(request) for request in requests]))


def compute_check_exit_code(report: SourceReport) -> ExitCode:
    """Return the exit code of a check; notes are no findings, a file that could not be checked is a failure."""
    return of_findings(not report.is_clean, report.errors)


def _read_requests(settings: Rewrite | Check, changed_only: bool, base_ref: str | None) -> list[ProjectRequest]:
    return read_requests(
        settings.paths, changed_only=changed_only, base_ref=base_ref, source=settings.source, target=settings.target
    )


def _check_project(request: ProjectRequest) -> Outcome:
    from codemods.checking.check import check_paths
    from codemods.tree.outcome import find_unused_comments
    from codemods.tree.selection import Suppressions

    suppressions = Suppressions(request.selection)
    outcome = check_paths(request.paths, suppressions, request.source, request.target)
    return replace(outcome, findings=(*outcome.findings, *find_unused_comments(suppressions)))


def plan_reshard(
    settings: Reshard, external: SourceSettings | None, *, quiet: bool = True, dry_run: bool = False
) -> ReshardPlan:
    """Fetch the source if it is on the hub, and plan how to reshard it.

    Args:
        settings: what to reshard.
        external: how to read the source, from `migrator.options.external.read_external_settings`.
        quiet: show no progress of a download.
        dry_run: fetch only indexes, configs and headers, which a plan is made of.

    Raises:
        UsageError: the sizes do not form a mesh.
        MigratorError: the source cannot be read, or cannot be resharded as asked.
    """
    from migrator.options.common import build_mesh
    from runtime.checkpoint.resharding.output_files import ReshardTarget
    from runtime.hub import resolve_folder

    mesh, mode = build_mesh(settings.mode, **{axis: getattr(settings, axis) for axis in AXES})
    layout = settings.layout or ("dcp" if mesh.world_size > 1 else "hf")
    target = ReshardTarget(layout, mesh, mode, settings.experts, settings.optimizer)
    folder = resolve_folder(settings.source, quiet=quiet, content="headers" if dry_run else "side files")
    from runtime.checkpoint.files.side_files import follow_links

    with gc_paused(), follow_links(settings.follow_links):
        # The import takes seconds, so it waits until the source is known to exist.
        from runtime.checkpoint.resharding.plan import plan_reshard

        return plan_reshard(folder, target=target, external=external)


def estimate_reshard(plan: ReshardPlan, settings: Reshard) -> Estimate:
    """Estimate the disk, memory and time that a planned reshard would take."""
    from runtime.checkpoint.resharding.estimate import estimate

    return estimate(plan, settings.destination, settings.max_memory * _MIB)


def reshard(
    plan: ReshardPlan,
    settings: Reshard,
    progress: Progress,
    notify: Callable[[str], None],
    *,
    timeout: float | None = None,
) -> ReshardResult | None:
    """Carry out a planned reshard; under torchrun each rank writes its share.

    Args:
        plan: the plan, from `plan_reshard`.
        settings: the settings that it was planned from.
        progress: called with the bytes done, the bytes in all and the current tensor.
        notify: called with notes for the user.
        timeout: how long ranks wait for each other under torchrun, in seconds.

    Returns:
        What was written, None on ranks other than the first.

    Raises:
        DestinationError: the destination exists or cannot be written.
        MigratorError: the source cannot be read, or a signal stopped the run.
    """
    from runtime.checkpoint.resharding.execute import ReshardOptions
    from runtime.processes.started import is_worker_process

    options = ReshardOptions(progress, notify, settings.max_memory * _MIB, settings.overwrite)
    if timeout is None or not is_worker_process():
        from runtime.checkpoint.resharding.execute import execute_reshard

        return execute_reshard(plan, settings.destination, options)
    from runtime.checkpoint.resharding.distribute import execute_distributed_reshard
    from runtime.processes.group import process_group

    with process_group(timeout):
        return execute_distributed_reshard(plan, settings.destination, options)


def is_finished(
    plan: ReshardPlan, settings: Reshard, progress: AbstractContextManager[Progress], notify: Callable[[str], None]
) -> bool:
    """Return whether the destination already holds exactly the planned result, as after a kill past the commit.

    Args:
        plan: the plan, from `plan_reshard`.
        settings: the settings that it was planned from.
        progress: see `verify`.
        notify: called with notes for the user.

    Raises:
        DestinationError: the destination cannot be read.
        MigratorError: see `verify`.
    """
    from runtime.checkpoint.resharding.finished import has_expected_files

    if not os.path.lexists(settings.destination) or not has_expected_files(plan, settings.destination):
        return False
    notify(f"note: {settings.destination} is there already, and is compared with {plan.checkpoint.folder}")
    external = {setting.name: getattr(settings, setting.name) for setting in fields(ExternalOptions)}
    comparison = Verify(
        settings.source, str(settings.destination), settings.max_memory, settings.follow_links, **external
    )
    return verify(comparison, progress).ok


def verify(
    settings: Verify,
    progress: AbstractContextManager[Progress],
    *,
    quiet: bool = True,
    record: Path | None = None,
    with_sha256: bool = False,
) -> Verification:
    """Compare a checkpoint with its manifest or with another checkpoint.

    Args:
        settings: what to compare.
        progress: entered once the checkpoints are fetched, and gives what is called with the bytes done, the bytes in
            all and the current tensor.
        quiet: show no progress of a download.
        record: a new file for the digests of the checkpoint, which is written if nothing differs.
        with_sha256: add the SHA-256 of each file to it.

    Raises:
        DestinationError: the file cannot be written.
        MigratorError: a checkpoint cannot be found or read.
    """
    from runtime.hub import resolve_folder

    external = read_external_settings(settings, settings.source)
    folders = [resolve_folder(name, quiet=quiet) for name in (settings.source, settings.other) if name is not None]
    from runtime.checkpoint.digest_file import read_digest_file, write_digest_file
    from runtime.checkpoint.files.side_files import follow_links
    from runtime.checkpoint.verifying.verify import verify

    recorded = read_digest_file(settings.digests) if settings.digests is not None else None
    with progress as advance, follow_links(settings.follow_links):
        result = verify(
            *folders,
            max_memory=settings.max_memory * _MIB,
            progress=advance,
            external=external,
            recorded=recorded,
            reads_all=record is not None,
        )
        if record is not None and result.ok and result.source.checkpoint is not None:
            digests = {copy.name: digest for copy, digest in result.source.digests.items()}
            write_digest_file(record, result.source.checkpoint, digests, with_sha256=with_sha256)
    return result


@dataclass(frozen=True)
class Validation:
    """A validation that was run.

    Args:
        request: the checkpoint, and the mesh and mode that were chosen for it.
        result: what the ranks found.
    """

    request: ValidationRequest
    result: ValidationResult


def validate(settings: Validate, *, quiet: bool = True) -> Validation:
    """Prove a checkpoint on a real mesh; under torchrun this process is one of them.

    Args:
        settings: what to validate.
        quiet: show no progress of a download.

    Raises:
        UsageError: the checkpoint was laid out for another mesh or mode.
        MigratorError: a checkpoint cannot be found, or the workers failed.
    """
    from runtime.hub import resolve_folder
    from runtime.processes.started import is_worker_process
    from runtime.validation.request import ValidationRequest, resolve_mesh
    from runtime.validation.worker import run_validation, validate_as_rank

    sizes = {axis: size for axis in AXES if (size := getattr(settings, axis)) is not None}
    if sizes.get("pp", 1) > 1:
        Mesh(**sizes)  # what goes with no pipeline is refused before anything is read
    # Everything, because the ranks are other processes.
    folder = resolve_folder(settings.source, quiet=quiet, content="everything")
    reference = resolve_folder(settings.reference, quiet=quiet, content="everything") if settings.reference else None
    mesh, mode = resolve_mesh(folder, sizes, settings.mode)
    request = ValidationRequest(
        folder,
        mesh,
        mode,
        reference,
        settings.device,
        settings.tolerance,
        settings.timeout,
        plan=_read_plan(settings.plan) if settings.plan else None,
        allow_unexercised=settings.allow_unexercised,
        ranks=settings.ranks,
        follow_links=settings.follow_links,
        by_block=settings.by_block,
        digests=settings.digests,
    )
    return Validation(request, validate_as_rank(request) if is_worker_process() else run_validation(request))


def _read_plan(file: Path) -> dict[str, str]:
    """Return the styles of a plan file.

    Raises:
        UsageError: the file is not a plan, or has a placement, which says nothing about what is computed.
        CheckpointError: the file cannot be read.
    """
    from plans.placement import Replicate
    from runtime.checkpoint.external.plan import read_plan_file

    entries = {key: "replicate" if value == Replicate() else value for key, value in read_plan_file(file).items()}
    for key, value in entries.items():
        if not isinstance(value, str):
            raise UsageError(
                f"{file}: {key!r} has a placement, but a model runs by styles",
                hint="give the key a style, such as colwise",
                key=key,
            )
    return {key: value for key, value in entries.items() if isinstance(value, str)}
