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

_KEPT = 256


class OpenFiles:
    """Descriptors of a folder's files, for reading and writing; the first few stay open, others open for each use."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._kept: dict[str, int] = {}
        self._lock = Lock()
        self._turns: defaultdict[str, Lock] = defaultdict(Lock)

    def turn(self, name: str) -> Lock:
        """Return the lock of whose turn it is to write a file: the system lets in one, and others spin for theirs."""
        with self._lock:
            return self._turns[name]

    @contextmanager
    def opened(self, name: str) -> Iterator[int]:
        """Give the descriptor of a file that exists."""
        descriptor = self._kept.get(name)
        if descriptor is None:
            descriptor = self._open(name)
        try:
            yield descriptor
        finally:
            if self._kept.get(name) != descriptor:
                os.close(descriptor)

    def _open(self, name: str) -> int:
        with self._lock:
            if name in self._kept:
                return self._kept[name]
            descriptor = os.open(self.folder / name, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            if len(self._kept) < _KEPT:
                self._kept[name] = descriptor
            return descriptor

    def __enter__(self) -> OpenFiles:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        while self._kept:
            os.close(self._kept.popitem()[1])
