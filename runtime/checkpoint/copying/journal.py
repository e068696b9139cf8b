"""The journal of a copy: what of it is safe on the disk, so that a killed run can go on where it was.

It is a file of lines, each behind a checksum: first the fingerprint of what is copied, then, now and then, how many
units of work are done and the sums of the digests that grew with them. A line is written only when the disk has all
that it speaks of; one that a crash cut short ends the journal.
"""

from __future__ import annotations

import json
import os
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from plans.errors import CheckpointError
from runtime.checkpoint.digest import Digest

__all__ = ["Journal", "JournalState", "begin_journal", "end_journal", "read_journal"]

JOURNAL_INTERVAL = 5.0
"""Between two lines: what a killed run loses at most, and how much the page cache is given to hold."""


@dataclass(frozen=True)
class JournalState:
    """What a journal says.

    Args:
        fingerprint: the fingerprint of what is copied; empty where the journal itself was cut short.
        units: of work that are done.
        digests: of the tensors that these units have a part of.
        size: of the journal in bytes, up to the last whole line.
    """

    fingerprint: str = ""
    units: int = 0
    digests: Mapping[str, str] = field(default_factory=dict, repr=False)
    size: int = 0

    def reset(self) -> JournalState:
        """Return the same journal with nothing done."""
        return JournalState(self.fingerprint, size=len(_encode_line({"key": self.fingerprint})))


def begin_journal(path: Path, fingerprint: str) -> None:
    """Write the first line of a journal, whatever else it held."""
    with path.open("wb") as stream:
        stream.write(_encode_line({"key": fingerprint}))
        stream.flush()
        os.fsync(stream.fileno())


def end_journal(path: Path, units: int, digests: Mapping[str, str]) -> None:
    """Add that all units of work are done, to a journal whose files the disk has; others may still be at work."""
    _append(path, {"units": units, "digests": dict(digests)})


def read_journal(path: Path) -> JournalState:
    """Read a journal as far as it is whole."""
    key, units, digests, size = "", 0, dict[str, str](), 0
    for line in path.read_bytes().splitlines(keepends=True):
        checksum, _, text = line.partition(b" ")
        if not line.endswith(b"\n") or checksum != _checksum(text):
            break
        entry = json.loads(text)
        key, units = entry.get("key", key), entry.get("units", units)
        digests |= entry.get("digests", {})
        size += len(line)
    return JournalState(key, units, digests, size)


class Journal:
    """Keeps a copy safe against the death of its process, on a thread of its own while copying goes on.

    Args:
        path: of the journal, begun before.
        state: what it says, in which the digests begin too.
        files: that are written.
        digests: by name, running.
        stop: returns the name of the signal that asked to stop.
        interval: between two lines.
    """

    def __init__(
        self,
        path: Path,
        state: JournalState,
        files: Sequence[Path],
        digests: Mapping[str, Digest],
        stop: Callable[[], str | None],
        interval: float = JOURNAL_INTERVAL,
    ) -> None:
        self.units = state.units
        self._path, self._files, self._digests, self._stop, self._interval = path, files, digests, stop, interval
        self._recorded = dict(state.digests)
        self._pool = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None
        self._last = time.monotonic()
        os.truncate(path, state.size)

    def is_due(self) -> bool:
        """Return whether it is time for the next line, or to stop."""
        if self._stop() is not None:
            return True
        if self._pending is not None and not self._pending.done():
            return False
        return time.monotonic() - self._last >= self._interval

    def record(self, units: int, bytes_done: int) -> None:
        """Bring what is written to the disk, then say so.

        Args:
            units: of work that are done, all of their bytes given to the files and digests.
            bytes_done: that they wrote.

        Raises:
            CheckpointError: a signal asked to stop.
        """
        self._wait_for_pending()
        grown = {
            name: text for name, digest in self._digests.items() if self._recorded.get(name) != (text := str(digest))
        }
        self._pending = self._pool.submit(self._write_entry, {"units": units, "digests": grown})
        self._recorded |= grown
        self.units, self._last = units, time.monotonic()
        if (signal := self._stop()) is not None:
            self._wait_for_pending()
            raise CheckpointError(
                f"stopped by {signal}; {bytes_done:,} bytes are safe in {self._path.parent}",
                hint="run the same command again, and it goes on from there",
                signal=signal,
                bytes_done=bytes_done,
            )

    def _wait_for_pending(self) -> None:
        if self._pending is not None:
            self._pending.result()

    def _write_entry(self, entry: Mapping[str, object]) -> None:
        for path in self._files:
            _flush_to_disk(path)
        _append(self._path, entry)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._pool.shutdown()
        if kind is None:
            self._wait_for_pending()


def _append(path: Path, entry: Mapping[str, object]) -> None:
    with path.open("ab") as stream:
        stream.write(_encode_line(entry))
        stream.flush()
        os.fdatasync(stream.fileno())


def _flush_to_disk(path: Path) -> None:
    """Sync a file's bytes, and let the page cache have its memory back."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fdatasync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _encode_line(entry: Mapping[str, object]) -> bytes:
    text = json.dumps(entry, separators=(",", ":")).encode() + b"\n"
    return _checksum(text) + b" " + text


def _checksum(text: bytes) -> bytes:
    return b"%08x" % zlib.crc32(text)
