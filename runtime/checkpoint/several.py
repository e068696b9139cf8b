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
from runtime.agreement import gather_json, together
from runtime.checkpoint.commit import MARKER, partial_folder, staging, sync, writing
from runtime.checkpoint.copy import work_of
from runtime.checkpoint.digest import Digest
from runtime.checkpoint.execution import (
    Options,
    ReshardResult,
    Seconds,
    check_apart,
    complete,
    create_files,
    fill,
)
from runtime.checkpoint.fingerprint import fingerprint, outline
from runtime.checkpoint.journal import begin_journal, end_journal, read_journal
from runtime.checkpoint.shares import share_of

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
    _check_same_plan(plan, options)
    rank, began = dist.get_rank(), time.perf_counter()
    share = replace(plan, table=share_of(plan.table, rank, dist.get_world_size()))
    with ExitStack() as staged:
        folder = _stage(destination, lambda: _entered(staged, share, destination, options))
        mine = _stage(destination, lambda: _filled(share, folder, options))
        copied = time.perf_counter()
        read, digests = _summed(mine, plan)

        def commit() -> ReshardResult | None:
            if rank:
                return None
            names, manifest = complete(plan, folder, digests)
            for path in folder.glob(f"{MARKER}-*"):
                path.unlink()
            staged.close()
            seconds = Seconds(plan.planning, copied - began, time.perf_counter() - copied)
            return ReshardResult(destination, names, read, plan.table.bytes_written, seconds, digests, manifest)

        return _stage(destination, commit)


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
        )


def _entered(staged: ExitStack, share: ReshardPlan, destination: Path, options: Options) -> Path:
    """Return the folder to work in, which the first rank makes."""
    check_apart(share.content.folder, destination)
    if dist.get_rank():
        return partial_folder(destination)
    key = fingerprint(share, options.max_memory)
    opened = staging(destination, share.bytes_needed, key=key, overwrite=options.overwrite, say=options.say)
    folder = staged.enter_context(opened)
    create_files(share, folder)
    return folder


def _filled(share: ReshardPlan, folder: Path, options: Options) -> tuple[int, Mapping[str, str]]:
    """Move a rank's share and bring it to the disk; return the bytes read and the digests of what was moved."""
    rank = dist.get_rank()
    path = folder / (f"{MARKER}-{rank:05d}" if rank else MARKER)
    if rank:
        _begin(path, fingerprint(share, options.max_memory))
    read, digests = fill(share, folder, path, options)
    for file in share.laid.files:
        sync(folder / file.name)
    # Others may take longer, and one that is lost then must not cost this rank's work.
    end_journal(path, sum(1 for _ in work_of(share.table, options.max_memory)), _grown(digests))
    return read, _grown(digests)


def _begin(path: Path, key: str) -> None:
    """Begin a journal, unless an earlier run left one of the same work."""
    if path.exists():
        if read_journal(path).key == key:
            return
        path.unlink()
    begin_journal(path, key)


def _grown(digests: Mapping[str, str]) -> Mapping[str, str]:
    """Return the digests of those tensors that a share has a part of."""
    empty = str(Digest())
    return {name: text for name, text in digests.items() if text != empty}


def _summed(mine: tuple[int, Mapping[str, str]], plan: ReshardPlan) -> tuple[int, Mapping[str, str]]:
    """Return the bytes that all ranks read, and the digests of the whole tensors."""
    sums = {name: Digest() for name in plan.content.all_tensors}
    counts = 0
    for count, parts in gather_json(mine):
        counts += count
        for name, text in parts.items():
            sums[name].join(Digest.parse(text))
    return counts, {name: str(total) for name, total in sums.items()}
