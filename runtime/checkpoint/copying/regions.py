"""Regions: where copies write, each a range of bytes in a file, in memory, or only in a digest."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from runtime.checkpoint.copying.copy_plan import Destination
from runtime.checkpoint.copying.strided import Bytes
from runtime.checkpoint.digest import Digest
from runtime.checkpoint.files.system import READ_WRITE, read_at, write_at

__all__ = [
    "DigestRegion",
    "FileRegion",
    "MemoryRegion",
    "OpenFiles",
    "Region",
    "SharedRegion",
    "allocate_files",
    "build_regions",
]

_MAX_OPEN = 256
"""How many descriptors stay open, well below the system's limit on open files."""


class OpenFiles:
    """Descriptors of a folder's files for reading and writing; those beyond `_MAX_OPEN` are opened for each use."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._descriptors: dict[str, int] = {}
        self._lock = Lock()
        self._write_locks: defaultdict[str, Lock] = defaultdict(Lock)

    def get_write_lock(self, name: str) -> Lock:
        """Return the lock to hold while writing a file: the kernel admits one writer, and others would spin."""
        with self._lock:
            return self._write_locks[name]

    @contextmanager
    def open(self, name: str) -> Iterator[int]:
        """Give the descriptor of a file that exists."""
        descriptor = self._descriptors.get(name)
        if descriptor is None:
            descriptor = self._open_descriptor(name)
        try:
            yield descriptor
        finally:
            if self._descriptors.get(name) != descriptor:
                os.close(descriptor)

    def _open_descriptor(self, name: str) -> int:
        with self._lock:
            if name in self._descriptors:
                return self._descriptors[name]
            descriptor = os.open(self.folder / name, READ_WRITE)
            if len(self._descriptors) < _MAX_OPEN:
                self._descriptors[name] = descriptor
            return descriptor

    def __enter__(self) -> OpenFiles:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])


class Region(Protocol):
    """Receives bytes by their offset, from several threads at once."""

    def write(self, offset: int, content: Bytes) -> None:
        """Write contiguous bytes."""

    def write_rows(self, offset: int, rows: NDArray[Any], stride: int) -> bool:
        """Write rows that are `stride` bytes apart, or return False if they must be assembled into blocks first."""

    def read(self, offset: int, buffer: Bytes) -> None:
        """Fill a buffer with bytes that can be written back without changing the region."""


@dataclass(frozen=True, slots=True)
class FileRegion:
    """A range of a file; it accepts contiguous bytes only, because every write is a system call.

    Args:
        files: the open files of the folder.
        name: the file's name.
        base: the offset of the range in the file.
    """

    files: OpenFiles
    name: str
    base: int

    def write(self, offset: int, content: Bytes) -> None:
        """Write contiguous bytes, however many calls it takes."""
        view, done = content.data, 0
        with self.files.open(self.name) as descriptor, self.files.get_write_lock(self.name):
            while done < len(view):
                done += write_at(descriptor, view[done:], self.base + offset + done)

    def write_rows(self, offset: int, rows: NDArray[Any], stride: int) -> bool:
        """Return False: rows are assembled first."""
        return False

    def read(self, offset: int, buffer: Bytes) -> None:
        """Read bytes back; bytes that were never written are zeros."""
        view, done = buffer.data, 0
        with self.files.open(self.name) as descriptor:
            while done < len(view):
                count = read_at(descriptor, view[done:], self.base + offset + done)
                if not count:
                    buffer[done:] = 0
                    return
                done += count


@dataclass(frozen=True, slots=True)
class SharedRegion:
    """A region some of whose bytes are there already and are not written again.

    Args:
        region: the region that receives the other bytes.
        shared: the (start, stop) ranges that are there, in order and without overlaps.
    """

    region: Region
    shared: Sequence[tuple[int, int]]

    def write(self, offset: int, content: Bytes) -> None:
        """Write the bytes that are not there yet."""
        for start, stop in self._find_gaps(offset, offset + len(content)):
            self.region.write(start, content[start - offset : stop - offset])

    def write_rows(self, offset: int, rows: NDArray[Any], stride: int) -> bool:
        """Return False: rows are assembled first."""
        return False

    def read(self, offset: int, buffer: Bytes) -> None:
        """Read bytes back, shared or not."""
        self.region.read(offset, buffer)

    def _find_gaps(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        index = max(0, bisect_right(self.shared, (start, start)) - 1)
        while start < stop and index < len(self.shared) and self.shared[index][0] < stop:
            shared_start, shared_stop = self.shared[index]
            if start < shared_start:
                yield start, shared_start
            start, index = max(start, shared_stop), index + 1
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
    """A region that only feeds a digest, whose sums are additive: every byte must come once, and zeros do no harm."""

    digest: Digest
    lock: Lock = field(default_factory=Lock)

    def write(self, offset: int, content: Bytes) -> None:
        """Add contiguous bytes to the sums."""
        sums = Digest()
        sums.add(offset, content)
        with self.lock:
            self.digest.join(sums)

    def write_rows(self, offset: int, rows: NDArray[Any], stride: int) -> bool:
        """Add rows to the sums if they are whole words and numerous enough, otherwise return False."""
        sums = Digest()
        is_added = sums.add_rows(offset, rows, stride)
        with self.lock:
            self.digest.join(sums)
        return is_added

    def read(self, offset: int, buffer: Bytes) -> None:
        """Fill with zeros, because bytes that were added must not be added again."""
        buffer[...] = 0


def allocate_files(folder: Path, files: Mapping[str, tuple[int, Mapping[int, bytes]]]) -> None:
    """Create files at their full size and write the bytes that are known already; other content stays.

    Args:
        folder: a folder that may contain some of the files from an earlier run.
        files: by name, the size in bytes and the known bytes by their offset.
    """
    with OpenFiles(folder) as opened:
        for name, (size, fixed_bytes) in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).touch(mode=0o644)
            os.truncate(folder / name, size)
            region = FileRegion(opened, name, 0)
            for offset, content in fixed_bytes.items():
                region.write(offset, np.frombuffer(content, np.uint8))


def build_regions(destinations: Sequence[Destination], files: OpenFiles, digests: Sequence[Digest]) -> list[Region]:
    """Return the region of each destination: a range of its file, or the next digest where it has no file."""
    remaining = iter(digests)
    return [
        DigestRegion(next(remaining)) if to.file is None else FileRegion(files, to.file, to.offset)
        for to in destinations
    ]
