"""Regions: where runs end, each a range of bytes in a file, in memory, or only in a digest."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from runtime.checkpoint.copying.strided import Bytes
from runtime.checkpoint.digest import Digest
from runtime.checkpoint.files.open_files import OpenFiles

__all__ = ["DigestRegion", "FileRegion", "MemoryRegion", "Region", "SharedRegion"]


class Region(Protocol):
    """Takes bytes by their offset, from several threads at once."""

    def write(self, offset: int, content: Bytes) -> None:
        """Take contiguous bytes."""

    def write_rows(self, offset: int, rows: NDArray[Any], stride: int) -> bool:
        """Take rows that lie `stride` bytes apart, or return False where they must be assembled first."""

    def read(self, offset: int, buffer: Bytes) -> None:
        """Fill a buffer with what writing it back would keep."""


@dataclass(frozen=True, slots=True)
class FileRegion:
    """A range of a file; it takes whole pieces only, for each is a call to the system.

    Args:
        files: of the folder, open for reading and writing.
        name: of the file.
        base: where the region begins in the file.
    """

    files: OpenFiles
    name: str
    base: int

    def write(self, offset: int, content: Bytes) -> None:
        """Write contiguous bytes, however many calls it takes."""
        view, done = content.data, 0
        with self.files.open(self.name) as descriptor, self.files.get_write_lock(self.name):
            while done < len(view):
                done += os.pwrite(descriptor, view[done:], self.base + offset + done)

    def write_rows(self, offset: int, rows: NDArray[Any], stride: int) -> bool:
        """Refuse: rows are assembled first."""
        return False

    def read(self, offset: int, buffer: Bytes) -> None:
        """Read bytes back; what was never written reads as zeros."""
        view, done = buffer.data, 0
        with self.files.open(self.name) as descriptor:
            while done < len(view):
                count = os.preadv(descriptor, [view[done:]], self.base + offset + done)
                if not count:
                    buffer[done:] = 0
                    return
                done += count


@dataclass(frozen=True, slots=True)
class SharedRegion:
    """A region that has some of its bytes already, and does not take them again.

    Args:
        region: that takes the others.
        shared: (start, stop) of what is there, in order, none of them overlapping.
    """

    region: Region
    shared: Sequence[tuple[int, int]]

    def write(self, offset: int, content: Bytes) -> None:
        """Hand on what is not there yet."""
        for start, stop in self._find_gaps(offset, offset + len(content)):
            self.region.write(start, content[start - offset : stop - offset])

    def write_rows(self, offset: int, rows: NDArray[Any], stride: int) -> bool:
        """Refuse: rows are assembled first."""
        return False

    def read(self, offset: int, buffer: Bytes) -> None:
        """Read bytes back, shared or not."""
        self.region.read(offset, buffer)

    def _find_gaps(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        index = max(0, bisect_right(self.shared, (start, start)) - 1)
        while start < stop and index < len(self.shared) and self.shared[index][0] < stop:
            begin, end = self.shared[index]
            if start < begin:
                yield start, begin
            start, index = max(start, end), index + 1
        if start < stop:
            yield start, stop


@dataclass(frozen=True, slots=True)
class MemoryRegion:
    """A buffer that holds the whole region."""

    content: Bytes

    def write(self, offset: int, content: Bytes) -> None:
        """Copy contiguous bytes."""
        self.content[offset : offset + len(content)] = content

    def write_rows(self, offset: int, rows: NDArray[Any], stride: int) -> bool:
        """Copy rows to their places."""
        target = np.ndarray(rows.shape, rows.dtype, self.content.data, offset, (stride, rows.itemsize))
        target[...] = rows
        return True

    def read(self, offset: int, buffer: Bytes) -> None:
        """Copy bytes back."""
        buffer[...] = self.content[offset : offset + len(buffer)]


@dataclass(frozen=True, slots=True)
class DigestRegion:
    """A region that only a digest sees; sums are additive, so that every byte must come once and zeros do no harm."""

    digest: Digest
    lock: Lock = field(default_factory=Lock)

    def write(self, offset: int, content: Bytes) -> None:
        """Add contiguous bytes to the sums."""
        sums = Digest()
        sums.add(offset, content)
        with self.lock:
            self.digest.join(sums)

    def write_rows(self, offset: int, rows: NDArray[Any], stride: int) -> bool:
        """Add rows to the sums where they consist of whole words, many to a place in their blocks."""
        sums = Digest()
        taken = sums.add_rows(offset, rows, stride)
        with self.lock:
            self.digest.join(sums)
        return taken

    def read(self, offset: int, buffer: Bytes) -> None:
        """Fill with zeros: what was added before must not be added again."""
        buffer[...] = 0
