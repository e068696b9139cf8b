"""Whether what an earlier run wrote is still there: units are read back from the destination and summed again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from runtime.checkpoint.copying.assemble import Assembler
from runtime.checkpoint.copying.copy import BLOCK, feed
from runtime.checkpoint.copying.regions import DigestRegion, Region
from runtime.checkpoint.copying.slabs import Slab
from runtime.checkpoint.copying.strided import Bytes, equal, scatter
from runtime.checkpoint.copying.table import Table
from runtime.checkpoint.digest import Digest
from runtime.extents.runs import Run, cut, flipped

__all__ = ["is_intact"]


def is_intact(table: Table, regions: Sequence[Region], work: Iterable[Sequence[Slab]], said: Mapping[str, str]) -> bool:
    """Return whether the destinations hold what the units of work brought there.

    A slab's bytes are put together again from where its runs took them. Every copy must be the same, and the digests
    of all slabs must be those that the journal has.

    Args:
        table: of the copy.
        regions: of the destinations.
        work: the units that are said to be done.
        said: the digest of each tensor after these units.
    """
    sums = {number: Digest() for number, at in enumerate(table.destinations) if at.file is None}
    summing = [DigestRegion(sums[n]) if n in sums else region for n, region in enumerate(regions)]
    sizes = [destination.size for destination in table.destinations]
    assembler = Assembler(summing, sizes, 64 * BLOCK, BLOCK, is_new=True)
    for unit in work:
        for slab in unit:
            content = np.zeros(slab.size, np.uint8)
            if not _reads_back(slab, content, table, regions):
                return False
            for part in slab.parts:
                if part.destination in sums:
                    feed(part, content, slab.start, table, summing, assembler)
    assembler.flush()
    found = {table.destinations[number].name: str(digest) for number, digest in sums.items()}
    empty = str(Digest())
    return all(said.get(name, empty) == digest for name, digest in found.items())


def _reads_back(slab: Slab, content: Bytes, table: Table, regions: Sequence[Region]) -> bool:
    """Fill the slab from its destinations, and return whether all of them agree."""
    for piece, span in _written(slab, table, regions):
        scatter(piece, span, piece.source_offset, content, slab.start)
    return all(
        equal(piece, span, piece.source_offset, content, slab.start) for piece, span in _written(slab, table, regions)
    )


def _written(slab: Slab, table: Table, regions: Sequence[Region]) -> Iterator[tuple[Run, Bytes]]:
    """Yield the runs that lead back from the files to a slab, block by block, each with the bytes that it spans."""
    for part in slab.parts:
        if table.destinations[part.destination].file is not None:
            for _, piece in cut(flipped(part), BLOCK):
                span = np.empty(piece.source_stop - piece.source_offset, np.uint8)
                regions[part.destination].read(piece.source_offset, span)
                yield piece, span
