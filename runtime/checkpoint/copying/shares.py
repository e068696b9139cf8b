"""Shares of a copy: what each of several processes moves, so that together they move everything once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from runtime.checkpoint.copying.slabs import group_by_source, group_connected_sources
from runtime.checkpoint.copying.table import CopyPlan
from runtime.extents.runs import StridedCopy

__all__ = ["select_rank_share"]


def select_rank_share(copy_plan: CopyPlan, rank: int, world_size: int) -> CopyPlan:
    """Return the part of a table that one process moves, about as many bytes as any other's.

    Each has sources that follow one another in their files. Those that meet in an assembled destination stay together,
    since blocks of it are read back and written whole.

    Args:
        copy_plan: of the whole copy.
        rank: of the process.
        world_size: of processes.
    """
    runs = group_by_source(copy_plan.copies)
    groups = group_connected_sources(copy_plan.sources, runs, copy_plan.narrow_destinations)
    owned = {
        number
        for group, owner in zip(groups, _assign_owners(groups, runs, world_size), strict=True)
        for number in group
        if owner == rank
    }
    return replace(copy_plan, copies=tuple(run for run in copy_plan.copies if run.source in owned))


def _assign_owners(
    groups: Sequence[Sequence[int]], copies: Mapping[int, Sequence[StridedCopy]], world_size: int
) -> list[int]:
    """Return whose each group is: that of the process in whose part of all bytes its middle falls."""
    sizes = [sum(run.size for number in group for run in copies[number]) for group in groups]
    total, before, owners = sum(sizes), 0, list[int]()
    for size in sizes:
        owners.append((2 * before + size) * world_size // (2 * total))
        before += size
    return owners
