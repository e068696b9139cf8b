"""Shares of a copy: what each of several processes moves, so that together they move everything once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from runtime.checkpoint.copying.slabs import by_source, meeting
from runtime.checkpoint.copying.table import Table
from runtime.extents.runs import Run

__all__ = ["share_of"]


def share_of(table: Table, rank: int, count: int) -> Table:
    """Return the part of a table that one process moves, about as many bytes as any other's.

    Each has sources that follow one another in their files. Those that meet in an assembled destination stay together,
    since blocks of it are read back and written whole.

    Args:
        table: of the whole copy.
        rank: of the process.
        count: of processes.
    """
    runs = by_source(table.runs)
    groups = meeting(table.sources, runs, table.assembled)
    owned = {
        number
        for group, owner in zip(groups, _owners(groups, runs, count), strict=True)
        for number in group
        if owner == rank
    }
    return replace(table, runs=tuple(run for run in table.runs if run.source in owned))


def _owners(groups: Sequence[Sequence[int]], runs: Mapping[int, Sequence[Run]], count: int) -> list[int]:
    """Return whose each group is: that of the process in whose part of all bytes its middle falls."""
    sizes = [sum(run.size for number in group for run in runs[number]) for group in groups]
    total, before, owners = sum(sizes), 0, list[int]()
    for size in sizes:
        owners.append((2 * before + size) * count // (2 * total))
        before += size
    return owners
