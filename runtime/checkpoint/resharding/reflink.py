"""A result that shares blocks with its source: planned for the disk it goes to, and cloned before bytes are copied."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.checkpoint.copying.clones import Clone, align_to_blocks, find_clones
from runtime.checkpoint.copying.copy_plan import CopyPlan
from runtime.checkpoint.copying.regions import Region, SharedRegion
from runtime.checkpoint.files.open_files import OpenFiles
from runtime.checkpoint.files.reading import open_descriptor
from runtime.checkpoint.files.reflink import clone_range, probe_block_size

if TYPE_CHECKING:
    from runtime.checkpoint.resharding.plan import ReshardPlan

__all__ = ["clone_shared_blocks", "find_block_size", "plan_block_sharing"]


def find_block_size(plan: ReshardPlan, destination: Path) -> int:
    """Return the bytes of a block that a plan's result can share with its source, 0 where it cannot.

    Args:
        plan: whose source there is.
        destination: a folder that the disk of its parent will hold.

    Raises:
        CheckpointError: a source cannot be read.
        OSError: the parent cannot be written.
    """
    used = {plan.copy_plan.sources[run.source].file for run in plan.copy_plan.copies}
    return probe_block_size(sorted(used), destination.absolute().parent)


def plan_block_sharing(plan: ReshardPlan, block: int) -> ReshardPlan:
    """Return a plan whose result shares all it can with its source.

    Args:
        plan: for any disk.
        block: bytes that the disk shares at least, 0 where it shares none.
    """
    table, files = align_to_blocks(plan.copy_plan, plan.output.files, block)
    return replace(plan, copy_plan=table, output=replace(plan.output, files=files), reflink_block=block)


def clone_shared_blocks(
    copy_plan: CopyPlan, block: int, files: OpenFiles, regions: Sequence[Region]
) -> tuple[list[Region], int]:
    """Clone what can be cloned, and return regions that leave it as it is, and the bytes that are shared now.

    What a disk refuses to share is left to copying. Doing it again does no harm, so that nobody needs to keep what
    was done.

    Args:
        copy_plan: of the copy.
        block: bytes that the disk shares at least, 0 where it shares none.
        files: of the result, at their full size.
        regions: of the table's destinations.

    Raises:
        CheckpointError: a source cannot be opened.
        OSError: the disk fails, or is full.
    """
    shared: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)
    for done in _clone_ranges(copy_plan, block, files):
        start = done.destination_offset - copy_plan.destinations[done.destination].offset
        shared[done.destination].append((start, start + done.length))
    kept = [SharedRegion(region, sorted(shared[n])) if n in shared else region for n, region in enumerate(regions)]
    return kept, sum(stop - start for ranges in shared.values() for start, stop in ranges)


def _clone_ranges(copy_plan: CopyPlan, block: int, files: OpenFiles) -> Iterator[Clone]:
    """Clone one range after the other, and yield those that the disk did share."""

    def get_source_file(one: Clone) -> Path:
        return copy_plan.sources[one.source].file

    for path, found in groupby(sorted(find_clones(copy_plan, block), key=get_source_file), key=get_source_file):
        with open_descriptor(path) as source:
            for one in found:
                name = copy_plan.destinations[one.destination].file
                assert name is not None, "only what goes to files is cloned"
                with files.open(name) as target:
                    done = clone_range(source, one.source_offset, one.length, target, one.destination_offset)
                if done:
                    yield one
