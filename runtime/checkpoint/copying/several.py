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
from runtime.checkpoint.copying.commit import check_destination, partial_folder, writing
from runtime.checkpoint.copying.execution import check_apart, complete, create_files, fill, grown, opened_for
from runtime.checkpoint.copying.fingerprint import fingerprint, outline
from runtime.checkpoint.copying.journal import begin_journal, read_journal
from runtime.checkpoint.copying.shares import share_of
from runtime.checkpoint.copying.sharing import block_for, sharing
from runtime.checkpoint.copying.stopping import Stop, check_not_stopped, stoppable
from runtime.checkpoint.copying.values import Filled, Options, ReshardResult, Seconds
from runtime.checkpoint.digest import Digest
from runtime.checkpoint.files.file_names import MARKER
from runtime.checkpoint.files.lock import held
from runtime.checkpoint.files.stamps import check_unchanged
from runtime.processes.agreement import gather_json, together

if TYPE_CHECKING:
    from runtime.checkpoint.reshard import ReshardPlan

__all__ = ["carry_out_together"]

Result = TypeVar("Result")


def carry_out_together(plan: ReshardPlan, destination: Path, options: Options) -> ReshardResult | None:
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
        MigratorError: as `carry_out`, on every rank alike.
    """
    rank, began = dist.get_rank(), time.perf_counter()
    plan = _sharing(plan, destination, options)
    _check_same_plan(plan, options)
    share = replace(plan, table=share_of(plan.table, rank, dist.get_world_size()))
    with ExitStack() as staged:
        stop = staged.enter_context(stoppable())
        folder = _stage(destination, lambda: _entered(staged, share, destination, options))
        mine = _stage(destination, lambda: _filled(share, folder, options, stop))
        copied = time.perf_counter()
        read, shared, digests = _summed(mine, plan)

        def commit() -> ReshardResult | None:
            if rank:
                return None
            names, manifest = complete(plan, folder, digests)
            check_not_stopped(stop, folder)
            for path in folder.glob(f"{MARKER}-*"):
                path.unlink()
            staged.close()
            seconds = Seconds(plan.planning, copied - began, time.perf_counter() - copied)
            written = plan.table.bytes_written
            return ReshardResult(destination, names, read, written, shared, seconds, digests, manifest)

        return _stage(destination, commit)


def _sharing(plan: ReshardPlan, destination: Path, options: Options) -> ReshardPlan:
    """Return the plan for the disk of the result, as the first rank finds it."""

    def found() -> int:
        if dist.get_rank():
            return 0
        check_destination(destination, overwrite=options.overwrite, names=plan.names)
        return block_for(plan, destination)

    return sharing(plan, gather_json(_stage(destination, found))[0])


def _stage(destination: Path, stage: Callable[[], Result]) -> Result:
    """Run a stage on every rank; what fails on one is raised on all."""

    def run() -> Result:
        with writing(destination):
            return stage()

    return together(run)


def _check_same_plan(plan: ReshardPlan, options: Options) -> None:
    if len(set(gather_json(outline(plan, options.max_memory)))) > 1:
        raise UsageError(
            f"{plan.content.folder}: the ranks do not plan the same",
            hint="give every rank the same command, the same source and the same versions of all packages",
            source=str(plan.content.folder),
        )


def _entered(staged: ExitStack, share: ReshardPlan, destination: Path, options: Options) -> Path:
    """Return the folder to work in, which the first rank makes."""
    check_apart(share.content.folder, destination)
    if dist.get_rank():
        return partial_folder(destination)
    key = fingerprint(share, options.max_memory)
    folder = staged.enter_context(opened_for(share, destination, key, options))
    create_files(share, folder)
    return folder


def _filled(share: ReshardPlan, folder: Path, options: Options, stop: Stop) -> Filled:
    """Move a rank's share and bring it to the disk; others may take longer, and one of them lost then costs nothing."""
    rank = dist.get_rank()
    path = folder / (f"{MARKER}-{rank:05d}" if rank else MARKER)
    with held(path):
        key = fingerprint(share, options.max_memory)
        if rank and read_journal(path).key != key:
            begin_journal(path, key)
        filled = fill(share, folder, path, options, stop)
    check_unchanged(share.content.folder, share.stamps, share.content.side.left_behind)
    return replace(filled, digests=grown(filled.digests))


def _summed(mine: Filled, plan: ReshardPlan) -> tuple[int, int, Mapping[str, str]]:
    """Return the bytes that all ranks read and those that they share, and the digests of the whole tensors."""
    sums = {name: Digest() for name in plan.content.all_tensors}
    read = shared = 0
    for count, blocks, parts in gather_json((mine.read, mine.shared, mine.digests)):
        read, shared = read + count, shared + blocks
        for name, text in parts.items():
            sums[name].join(Digest.parse(text))
    return read, shared, {name: str(total) for name, total in sums.items()}
