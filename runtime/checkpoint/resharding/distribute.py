"""Carrying a plan out with several processes, on one machine or many that see one file system.

Each plans for itself and moves its share of the bytes, with a journal of its own. The first one holds the lock, makes
the folder and commits it; digests of parts add up to those of the whole.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch.distributed as dist

from plans.errors import UsageError
from runtime.checkpoint.copying.commit import check_destination, convert_write_errors, partial_folder
from runtime.checkpoint.copying.journal import begin_journal, read_journal
from runtime.checkpoint.copying.signals import Stop, catch_stop_signals, check_not_stopped
from runtime.checkpoint.copying.slabs import select_rank_share
from runtime.checkpoint.digest import Digest
from runtime.checkpoint.files.file_names import MARKER
from runtime.checkpoint.files.lock import hold_lock
from runtime.checkpoint.files.stamps import check_unchanged
from runtime.checkpoint.resharding.execute import (
    check_not_nested,
    complete_folder,
    create_files,
    drop_empty_digests,
    stage_plan,
    write_tensors,
)
from runtime.checkpoint.resharding.fingerprint import compute_fingerprint, compute_plan_hash
from runtime.checkpoint.resharding.reflink import find_block_size, plan_block_sharing
from runtime.checkpoint.resharding.results import CopyResult, PhaseSeconds, ReshardOptions, ReshardResult
from runtime.processes.agreement import all_gather_json, raise_on_any_rank

if TYPE_CHECKING:
    from runtime.checkpoint.resharding.plan import ReshardPlan

__all__ = ["execute_distributed_reshard"]

Result = TypeVar("Result")


def execute_distributed_reshard(plan: ReshardPlan, destination: Path, options: ReshardOptions) -> ReshardResult | None:
    """Carry a plan out as one rank of the process group; all ranks call this, each with its own plan of the same.

    A rank that is lost leaves what a run with as many ranks goes on with.

    Args:
        plan: of the whole work.
        destination: as all ranks see it, a folder that must not exist, or may be replaced.
        options: how; what happens to an existing destination is for the first rank's to say.

    Returns:
        What was written, on the first rank; None on others.

    Raises:
        UsageError: the ranks have different plans.
        WorkerError: a rank was lost, or did not answer in time.
        MigratorError: as `execute_reshard`, on every rank alike.
    """
    rank, began = dist.get_rank(), time.perf_counter()
    plan = _agree_on_block_sharing(plan, destination, options)
    _check_same_plan(plan, options)
    share = replace(plan, copy_plan=select_rank_share(plan.copy_plan, rank, dist.get_world_size()))
    with ExitStack() as staged:
        stop = staged.enter_context(catch_stop_signals())
        folder = _run_stage(destination, lambda: _enter_partial_folder(staged, share, destination, options))
        mine = _run_stage(destination, lambda: _write_share(share, folder, options, stop))
        copied = time.perf_counter()
        read, shared, digests = _sum_digests(mine, plan)

        def commit() -> ReshardResult | None:
            if rank:
                return None
            names, manifest = complete_folder(plan, folder, digests)
            check_not_stopped(stop, folder)
            for path in folder.glob(f"{MARKER}-*"):
                path.unlink()
            staged.close()
            seconds = PhaseSeconds(plan.planning_seconds, copied - began, time.perf_counter() - copied)
            written = plan.copy_plan.bytes_written
            return ReshardResult(destination, names, read, written, shared, seconds, digests, manifest)

        return _run_stage(destination, commit)


def _agree_on_block_sharing(plan: ReshardPlan, destination: Path, options: ReshardOptions) -> ReshardPlan:
    """Return the plan for the disk of the result, as the first rank finds it."""

    def find_shared_block_size() -> int:
        if dist.get_rank():
            return 0
        check_destination(destination, overwrite=options.overwrite, names=plan.file_names)
        return find_block_size(plan, destination)

    return plan_block_sharing(plan, all_gather_json(_run_stage(destination, find_shared_block_size))[0])


def _run_stage(destination: Path, stage: Callable[[], Result]) -> Result:
    """Run a stage on every rank; what fails on one is raised on all."""

    def run() -> Result:
        with convert_write_errors(destination):
            return stage()

    return raise_on_any_rank(run)


def _check_same_plan(plan: ReshardPlan, options: ReshardOptions) -> None:
    if len(set(all_gather_json(compute_plan_hash(plan, options.max_memory)))) > 1:
        raise UsageError(
            f"{plan.checkpoint.folder}: the ranks do not plan the same",
            hint="give every rank the same command, the same source and the same versions of all packages",
            source=str(plan.checkpoint.folder),
        )


def _enter_partial_folder(staged: ExitStack, share: ReshardPlan, destination: Path, options: ReshardOptions) -> Path:
    """Return the folder to work in, which the first rank makes."""
    check_not_nested(share.checkpoint.folder, destination)
    if dist.get_rank():
        return partial_folder(destination)
    key = compute_fingerprint(share, options.max_memory)
    folder = staged.enter_context(stage_plan(share, destination, key, options))
    create_files(share, folder)
    return folder


def _write_share(share: ReshardPlan, folder: Path, options: ReshardOptions, stop: Stop) -> CopyResult:
    """Move a rank's share and bring it to the disk; others may take longer, and one of them lost then costs nothing."""
    rank = dist.get_rank()
    path = folder / (f"{MARKER}-{rank:05d}" if rank else MARKER)
    with hold_lock(path):
        key = compute_fingerprint(share, options.max_memory)
        if rank and read_journal(path).fingerprint != key:
            begin_journal(path, key)
        filled = write_tensors(share, folder, path, options, stop)
    check_unchanged(share.checkpoint.folder, share.stamps, share.checkpoint.side_files.left_behind)
    return replace(filled, digests=drop_empty_digests(filled.digests))


def _sum_digests(result: CopyResult, plan: ReshardPlan) -> tuple[int, int, Mapping[str, str]]:
    """Return the bytes that all ranks read and those that they share, and the digests of the whole tensors."""
    sums = {name: Digest() for name in plan.checkpoint.all_tensors}
    read = shared = 0
    for count, blocks, parts in all_gather_json((result.bytes_read, result.bytes_shared, result.digests)):
        read, shared = read + count, shared + blocks
        for name, text in parts.items():
            sums[name].join(Digest.parse(text))
    return read, shared, {name: str(total) for name, total in sums.items()}
