"""Execute a reshard on several processes, on one machine or on several that share a file system.

Every rank makes the same plan and copies its share of the bytes, with a journal of its own. Rank 0 holds the lock,
creates the folder and commits it. The digests of the shares add up to those of the whole tensors.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from plans.errors import UsageError
from runtime.checkpoint.copying.commit import check_destination, check_not_nested, convert_write_errors, partial_folder
from runtime.checkpoint.copying.journal import begin_journal, read_journal
from runtime.checkpoint.copying.signals import Stop, catch_stop_signals, check_not_stopped
from runtime.checkpoint.copying.slabs import select_rank_share
from runtime.checkpoint.digest import Digest
from runtime.checkpoint.files.file_names import MARKER
from runtime.checkpoint.files.lock import hold_lock
from runtime.checkpoint.files.side_files import check_unchanged
from runtime.checkpoint.resharding.execute import (
    CopyResult,
    PhaseSeconds,
    ReshardOptions,
    ReshardResult,
    complete_folder,
    create_files,
    drop_empty_digests,
    stage_plan,
    write_tensors,
)
from runtime.checkpoint.resharding.fingerprint import compute_fingerprint, compute_plan_hash
from runtime.checkpoint.resharding.plan import ReshardPlan, find_block_size, plan_block_sharing
from runtime.processes.agreement import all_gather_json, raise_on_any_rank

__all__ = ["execute_distributed_reshard"]

Result = TypeVar("Result")


def execute_distributed_reshard(plan: ReshardPlan, destination: Path, options: ReshardOptions) -> ReshardResult | None:
    """Execute a plan as one rank of the default process group; every rank calls this with an equal plan.

    If a rank is lost, a later run with the same number of ranks continues the work.

    Args:
        plan: the plan of the whole reshard.
        destination: a folder that all ranks see, which must not exist unless `options.overwrite` is set.
        options: how to execute the plan; rank 0's decide what happens to an existing destination.

    Returns:
        What was written on rank 0, None on the other ranks.

    Raises:
        UsageError: the ranks have different plans.
        WorkerError: a rank was lost, or did not answer in time.
        MigratorError: what `execute_reshard` raises, on every rank.
    """
    rank, began = dist.get_rank(), time.perf_counter()
    plan = _agree_on_block_sharing(plan, destination, options)
    _check_same_plan(plan, options)
    share = replace(plan, copy_plan=select_rank_share(plan.copy_plan, rank, dist.get_world_size()))
    with ExitStack() as staged:
        stop = staged.enter_context(catch_stop_signals())
        folder = _run_stage(destination, lambda: _enter_partial_folder(staged, share, destination, options))
        result = _run_stage(destination, lambda: _write_share(share, folder, options, stop))
        copied_at = time.perf_counter()
        read, shared, digests = _sum_digests(result, plan)

        def commit() -> ReshardResult | None:
            if rank:
                return None
            names, manifest = complete_folder(plan, folder, digests)
            check_not_stopped(stop, folder)
            for path in folder.glob(f"{MARKER}-*"):
                path.unlink()
            staged.close()
            seconds = PhaseSeconds(plan.planning_seconds, copied_at - began, time.perf_counter() - copied_at)
            written = plan.copy_plan.bytes_written
            return ReshardResult(destination, names, read, written, shared, seconds, digests, manifest)

        return _run_stage(destination, commit)


def _agree_on_block_sharing(plan: ReshardPlan, destination: Path, options: ReshardOptions) -> ReshardPlan:
    """Return the plan for the destination's disk, as rank 0 probes it."""

    def find_shared_block_size() -> int:
        if dist.get_rank():
            return 0
        check_destination(destination, overwrite=options.overwrite, names=plan.file_names)
        return find_block_size(plan, destination)

    return plan_block_sharing(plan, all_gather_json(_run_stage(destination, find_shared_block_size))[0])


def _run_stage(destination: Path, stage: Callable[[], Result]) -> Result:
    """Run a stage on every rank, and raise on all ranks if it fails on one."""

    def run() -> Result:
        with convert_write_errors(destination):
            return stage()

    return raise_on_any_rank(run)


def _check_same_plan(plan: ReshardPlan, options: ReshardOptions) -> None:
    if len(set(all_gather_json(compute_plan_hash(plan, options.max_memory)))) > 1:
        raise UsageError(
            f"{plan.checkpoint.folder}: the ranks made different plans",
            hint="run the same command, on the same source and with the same package versions, on every rank",
            source=str(plan.checkpoint.folder),
        )


def _enter_partial_folder(staged: ExitStack, share: ReshardPlan, destination: Path, options: ReshardOptions) -> Path:
    """Return the folder to work in, which rank 0 creates."""
    check_not_nested(share.checkpoint.folder, destination)
    if dist.get_rank():
        return partial_folder(destination)
    fingerprint = compute_fingerprint(share, options.max_memory)
    folder = staged.enter_context(stage_plan(share, destination, fingerprint, options))
    create_files(share, folder)
    return folder


def _write_share(share: ReshardPlan, folder: Path, options: ReshardOptions, stop: Stop) -> CopyResult:
    """Copy a rank's share and sync it, so that it survives the loss of a rank that takes longer."""
    rank = dist.get_rank()
    path = folder / (f"{MARKER}-{rank:05d}" if rank else MARKER)
    with hold_lock(path):
        fingerprint = compute_fingerprint(share, options.max_memory)
        if rank and read_journal(path).fingerprint != fingerprint:
            begin_journal(path, fingerprint)
        result = write_tensors(share, folder, path, options, stop)
    check_unchanged(share.checkpoint.folder, share.stamps, share.checkpoint.side_files.left_behind)
    return replace(result, digests=drop_empty_digests(result.digests))


def _sum_digests(result: CopyResult, plan: ReshardPlan) -> tuple[int, int, Mapping[str, str]]:
    """Return the bytes that all ranks read, the bytes they share with the source, and the whole tensors' digests."""
    sums = {name: Digest() for name in plan.checkpoint.all_tensors}
    read = shared = 0
    for rank_read, rank_shared, rank_digests in all_gather_json(
        (result.bytes_read, result.bytes_shared, result.digests)
    ):
        read, shared = read + rank_read, shared + rank_shared
        for name, text in rank_digests.items():
            sums[name].join(Digest.parse(text))
    return read, shared, {name: str(digest) for name, digest in sums.items()}
