"""Whether what an earlier run wrote is still there: units are read back from the destination and summed again."""

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
    """Return whether the destinations hold what the units of work brought there.

    A slab's bytes are put together again from where its runs took them. Every copy must be the same, and the digests
    of all slabs must be those that the journal has.

    Args:
        copy_plan: of the copy.
        regions: of the destinations.
        work: the units that are said to be done.
        expected: the digest of each tensor after these units.
    """
    sums = {number: Digest() for number, at in enumerate(copy_plan.destinations) if at.file is None}
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
    found = {copy_plan.destinations[number].name: str(digest) for number, digest in sums.items()}
    empty = str(Digest())
    return all(expected.get(name, empty) == digest for name, digest in found.items())


def _is_slab_intact(slab: Slab, content: Bytes, copy_plan: CopyPlan, regions: Sequence[Region]) -> bool:
    """Fill the slab from its destinations, and return whether all of them agree."""
    for piece, span in _read_destinations(slab, copy_plan, regions):
        scatter(piece, span, piece.source_offset, content, slab.start)
    return all(
        is_equal(piece, span, piece.source_offset, content, slab.start)
        for piece, span in _read_destinations(slab, copy_plan, regions)
    )


def _read_destinations(
    slab: Slab, copy_plan: CopyPlan, regions: Sequence[Region]
) -> Iterator[tuple[StridedCopy, Bytes]]:
    """Yield the runs that lead back from the files to a slab, block by block, each with the bytes that it spans."""
    for part in slab.parts:
        if copy_plan.destinations[part.destination].file is not None:
            for _, piece in split_at_blocks(reverse(part), BLOCK):
                span = np.empty(piece.source_stop - piece.source_offset, np.uint8)
                regions[part.destination].read(piece.source_offset, span)
                yield piece, span
