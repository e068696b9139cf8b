"""The files of a folder by name, kept open as far as the system's limit on open files is not in the way."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from types import TracebackType

__all__ = ["OpenFiles"]

_MAX_OPEN = 256


class OpenFiles:
    """Descriptors of a folder's files, for reading and writing; the first few stay open, others open for each use."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._descriptors: dict[str, int] = {}
        self._lock = Lock()
        self._write_locks: defaultdict[str, Lock] = defaultdict(Lock)

    def get_write_lock(self, name: str) -> Lock:
        """Return the lock of whose turn it is to write a file: the system lets in one, and others spin for theirs."""
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
            descriptor = os.open(self.folder / name, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            if len(self._descriptors) < _MAX_OPEN:
                self._descriptors[name] = descriptor
            return descriptor

    def __enter__(self) -> OpenFiles:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])
