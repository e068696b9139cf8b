"""A result that shares blocks with its source: planned for the disk it goes to, and cloned before bytes are copied."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.checkpoint.copying.clones import Clone, aligned, clones_of
from runtime.checkpoint.copying.regions import Region, SharedRegion
from runtime.checkpoint.copying.table import Table
from runtime.checkpoint.files.open_files import OpenFiles
from runtime.checkpoint.files.reading import opened
from runtime.checkpoint.files.reflink import clone, shared_block

if TYPE_CHECKING:
    from runtime.checkpoint.reshard import ReshardPlan

__all__ = ["block_for", "share", "sharing"]


def block_for(plan: ReshardPlan, destination: Path) -> int:
    """Return the bytes of a block that a plan's result can share with its source, 0 where it cannot.

    Args:
        plan: whose source there is.
        destination: a folder that the disk of its parent will hold.

    Raises:
        CheckpointError: a source cannot be read.
        OSError: the parent cannot be written.
    """
    used = {plan.table.sources[run.source].file for run in plan.table.runs}
    return shared_block(sorted(used), destination.absolute().parent)


def sharing(plan: ReshardPlan, block: int) -> ReshardPlan:
    """Return a plan whose result shares all it can with its source.

    Args:
        plan: for any disk.
        block: bytes that the disk shares at least, 0 where it shares none.
    """
    table, files = aligned(plan.table, plan.laid.files, block)
    return replace(plan, table=table, laid=replace(plan.laid, files=files), block=block)


def share(table: Table, block: int, files: OpenFiles, regions: Sequence[Region]) -> tuple[list[Region], int]:
    """Clone what can be cloned, and return regions that leave it as it is, and the bytes that are shared now.

    What a disk refuses to share is left to copying. Doing it again does no harm, so that nobody needs to keep what
    was done.

    Args:
        table: of the copy.
        block: bytes that the disk shares at least, 0 where it shares none.
        files: of the result, at their full size.
        regions: of the table's destinations.

    Raises:
        CheckpointError: a source cannot be opened.
        OSError: the disk fails, or is full.
    """
    shared: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)
    for done in _cloned(table, block, files):
        start = done.destination_offset - table.destinations[done.destination].offset
        shared[done.destination].append((start, start + done.length))
    kept = [SharedRegion(region, sorted(shared[n])) if n in shared else region for n, region in enumerate(regions)]
    return kept, sum(stop - start for ranges in shared.values() for start, stop in ranges)


def _cloned(table: Table, block: int, files: OpenFiles) -> Iterator[Clone]:
    """Clone one range after the other, and yield those that the disk did share."""

    def file_of(one: Clone) -> Path:
        return table.sources[one.source].file

    for path, found in groupby(sorted(clones_of(table, block), key=file_of), key=file_of):
        with opened(path) as source:
            for one in found:
                name = table.destinations[one.destination].file
                assert name is not None, "only what goes to files is cloned"
                with files.opened(name) as target:
                    done = clone(source, one.source_offset, one.length, target, one.destination_offset)
                if done:
                    yield one
