"""Assemble destinations that are filled in short ranges: in memory, and written as whole blocks."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import Lock

import numpy as np

from runtime.checkpoint.copying.regions import Region
from runtime.checkpoint.copying.strided import Bytes, scatter
from runtime.tensor_map.strided_copy import StridedCopy, reverse, split_at_blocks

__all__ = ["Assembler"]

_BlockId = tuple[int, int]
"""A destination and the number of a block in it."""


@dataclass(slots=True)
class _Block:
    """A block of a destination, of which `missing` bytes are still to come; its content begins its buffer."""

    buffer: Bytes
    content: Bytes
    missing: int
    closed: bool = False
    lock: Lock = field(default_factory=Lock)


class Assembler:
    """Assembles blocks of destinations.

    A block is written to its region when it is complete, or earlier when its memory is needed for others. In that case
    it is read back as soon as more of its bytes arrive.

    Args:
        regions: the regions of the destinations.
        sizes: the sizes of the destinations in bytes.
        memory: the bytes that all blocks together may take.
        block: the size of a block in bytes.
        is_new: whether nothing has been written to the regions before.
    """

    def __init__(self, regions: Sequence[Region], sizes: Sequence[int], memory: int, block: int, is_new: bool) -> None:
        self._regions, self._sizes = regions, sizes
        self._block, self._max_open, self._is_new = block, max(1, memory // block), is_new
        self._open: OrderedDict[_BlockId, _Block] = OrderedDict()
        self._evicted: dict[_BlockId, int] = {}
        self._free_buffers: list[Bytes] = []
        self._lock = Lock()

    def add(self, copy: StridedCopy, slab: Bytes, start: int) -> None:
        """Add the bytes of a copy.

        Args:
            copy: a copy to an assembled destination.
            slab: the bytes of the source that it reads.
            start: the source offset of the slab's first byte.
        """
        for number, part in split_at_blocks(reverse(copy), self._block):
            self._fill_block((copy.destination, number), reverse(part), slab, start)

    def flush(self) -> None:
        """Write all blocks to their regions, complete or not."""
        self._evict_oldest(0)

    def _fill_block(self, key: _BlockId, part: StridedCopy, slab: Bytes, start: int) -> None:
        while True:
            block = self._get_block(key)
            with block.lock:
                if block.closed:
                    continue  # evicted after we found it and before we locked it
                scatter(part, slab, start, block.content, key[1] * self._block)
                block.missing -= part.size
                if block.missing:
                    return
                self._write_block(key, block)
            with self._lock:
                self._open.pop(key, None)
                self._free_buffers.append(block.buffer)
            return

    def _get_block(self, key: _BlockId) -> _Block:
        with self._lock:
            if key in self._open:
                self._open.move_to_end(key)
                return self._open[key]
        self._evict_oldest(self._max_open - 1)
        with self._lock:
            if key not in self._open:
                self._open[key] = self._allocate_block(key)
            return self._open[key]

    def _allocate_block(self, key: _BlockId) -> _Block:
        destination, number = key
        size = min(self._block, self._sizes[destination] - number * self._block)
        buffer = self._free_buffers.pop() if self._free_buffers else np.empty(self._block, np.uint8)
        content = buffer[:size]
        if key in self._evicted or not self._is_new:
            self._regions[destination].read(number * self._block, content)
        else:
            content[...] = 0
        return _Block(buffer, content, self._evicted.pop(key, size))

    def _evict_oldest(self, max_open: int) -> None:
        """Write the oldest blocks until at most `max_open` are open; no block reopens before it is written."""
        with self._lock:
            while len(self._open) > max_open:
                key, block = self._open.popitem(last=False)
                with block.lock:
                    if not block.closed:
                        self._write_block(key, block)
                        self._evicted[key] = block.missing
                        self._free_buffers.append(block.buffer)

    def _write_block(self, key: _BlockId, block: _Block) -> None:
        block.closed = True
        self._regions[key[0]].write(key[1] * self._block, block.content)
