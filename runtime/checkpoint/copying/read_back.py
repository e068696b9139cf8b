"""Check that what an earlier run wrote is still intact: read units back from the destination and digest them again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from runtime.checkpoint.copying.assembler import Assembler
from runtime.checkpoint.copying.copy import BLOCK, write_part
from runtime.checkpoint.copying.copy_plan import CopyPlan
from runtime.checkpoint.copying.regions import DigestRegion, Region
from runtime.checkpoint.copying.slabs import Slab
from runtime.checkpoint.copying.strided import Bytes, is_equal, scatter
from runtime.checkpoint.digest import Digest
from runtime.tensor_map.strided_copy import StridedCopy, reverse, split_at_blocks

__all__ = ["is_intact"]


def is_intact(
    copy_plan: CopyPlan, regions: Sequence[Region], work: Iterable[Sequence[Slab]], expected: Mapping[str, str]
) -> bool:
    """Return whether the destinations contain what the units of work wrote.

    Each slab is put together again from its destinations. All copies of a byte must be equal, and the digests of all
    slabs must equal the recorded ones.

    Args:
        copy_plan: the plan of the copy.
        regions: the regions of its destinations.
        work: the units that are recorded as done.
        expected: the recorded digest of each tensor after these units.
    """
    sums = {number: Digest() for number, to in enumerate(copy_plan.destinations) if to.file is None}
    summing = [DigestRegion(sums[n]) if n in sums else region for n, region in enumerate(regions)]
    sizes = [destination.size for destination in copy_plan.destinations]
    assembler = Assembler(summing, sizes, 64 * BLOCK, BLOCK, is_new=True)
    for unit in work:
        for slab in unit:
            content = np.zeros(slab.size, np.uint8)
            if not _is_slab_intact(slab, content, copy_plan, regions):
                return False
            for part in slab.parts:
                if part.destination in sums:
                    write_part(part, content, slab.start, copy_plan, summing, assembler)
    assembler.flush()
    actual = {copy_plan.destinations[number].name: str(digest) for number, digest in sums.items()}
    empty = str(Digest())
    return all(expected.get(name, empty) == digest for name, digest in actual.items())


def _is_slab_intact(slab: Slab, content: Bytes, copy_plan: CopyPlan, regions: Sequence[Region]) -> bool:
    """Fill the slab from its destinations, and return whether all of them are equal."""
    for part, span in _read_destinations(slab, copy_plan, regions):
        scatter(part, span, part.source_offset, content, slab.start)
    return all(
        is_equal(part, span, part.source_offset, content, slab.start)
        for part, span in _read_destinations(slab, copy_plan, regions)
    )


def _read_destinations(
    slab: Slab, copy_plan: CopyPlan, regions: Sequence[Region]
) -> Iterator[tuple[StridedCopy, Bytes]]:
    """Yield the copies that lead back from the files to a slab, block by block, each with the bytes it spans."""
    for part in slab.parts:
        if copy_plan.destinations[part.destination].file is not None:
            for _, back in split_at_blocks(reverse(part), BLOCK):
                span = np.empty(back.source_stop - back.source_offset, np.uint8)
                regions[part.destination].read(back.source_offset, span)
                yield back, span
