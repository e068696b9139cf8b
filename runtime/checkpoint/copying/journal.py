"""The journal of a copy: what is safe on the disk, so that the next run can continue the work of a killed one.

It is a file of lines, each preceded by a checksum. The first holds the fingerprint of the work; later ones hold the
number of units done and the digests that changed. A line is written only after everything it records has been synced,
and a line that a crash cut short ends the journal.
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
from runtime.checkpoint.files.system import READ_ONLY, drop_cached_pages, sync_data

__all__ = ["Journal", "JournalState", "begin_journal", "end_journal", "read_journal"]

JOURNAL_INTERVAL = 5.0
"""Seconds between two lines, which bound what a killed run loses and what the page cache has to hold."""


@dataclass(frozen=True)
class JournalState:
    """What a journal records.

    Args:
        fingerprint: the fingerprint of the work, or empty if the journal's first line was cut short.
        units: how many units of work are done.
        digests: the digests of the tensors that these units copied a part of.
        size: the size of the journal in bytes, up to the last whole line.
    """

    fingerprint: str = ""
    units: int = 0
    digests: Mapping[str, str] = field(default_factory=dict, repr=False)
    size: int = 0

    def reset(self) -> JournalState:
        """Return the state of the same journal with nothing done."""
        return JournalState(self.fingerprint, size=len(_encode_line({"key": self.fingerprint})))


def begin_journal(path: Path, fingerprint: str) -> None:
    """Start a journal, over whatever the file contained."""
    with path.open("wb") as stream:
        stream.write(_encode_line({"key": fingerprint}))
        stream.flush()
        os.fsync(stream.fileno())


def end_journal(path: Path, units: int, digests: Mapping[str, str]) -> None:
    """Record that all units of work are done, once the files are synced."""
    _append(path, {"units": units, "digests": dict(digests)})


def read_journal(path: Path) -> JournalState:
    """Read a journal up to its first damaged line."""
    fingerprint, units, digests, size = "", 0, dict[str, str](), 0
    for line in path.read_bytes().splitlines(keepends=True):
        checksum, _, text = line.partition(b" ")
        if not line.endswith(b"\n") or checksum != _checksum(text):
            break
        entry = json.loads(text)
        fingerprint, units = entry.get("key", fingerprint), entry.get("units", units)
        digests |= entry.get("digests", {})
        size += len(line)
    return JournalState(fingerprint, units, digests, size)


class Journal:
    """Makes a copy survive the death of its process, syncing on a thread of its own while copying continues.

    Args:
        path: the journal's file, begun before.
        state: what the journal records already.
        files: the files that are written.
        digests: the running digests by name, which start from the state's.
        stop: returns the name of the signal that asked to stop, or None.
        interval: the seconds between two lines.
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
        """Return whether it is time to write the next line, or to stop."""
        if self._stop() is not None:
            return True
        if self._pending is not None and not self._pending.done():
            return False
        return time.monotonic() - self._last >= self._interval

    def record(self, units: int, bytes_done: int) -> None:
        """Sync the files, then add a line to the journal.

        Args:
            units: how many units of work are done, all of their bytes handed to the files and digests.
            bytes_done: the bytes that these units wrote.

        Raises:
            CheckpointError: a signal asked to stop.
        """
        self._wait_for_pending()
        changed = {
            name: text for name, digest in self._digests.items() if self._recorded.get(name) != (text := str(digest))
        }
        self._pending = self._pool.submit(self._write_entry, {"units": units, "digests": changed})
        self._recorded |= changed
        self.units, self._last = units, time.monotonic()
        if (signal := self._stop()) is not None:
            self._wait_for_pending()
            raise CheckpointError(
                f"stopped by {signal}; {bytes_done:,} bytes are safe in {self._path.parent}",
                hint="run the same command again to continue from there",
                signal=signal,
                bytes_done=bytes_done,
            )

    def _wait_for_pending(self) -> None:
        if self._pending is not None:
            self._pending.result()

    def _write_entry(self, entry: Mapping[str, object]) -> None:
        for path in self._files:
            _sync_file(path)
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
        sync_data(stream.fileno())


def _sync_file(path: Path) -> None:
    """Sync a file's bytes, and release the memory that the page cache holds for them."""
    descriptor = os.open(path, READ_ONLY)
    try:
        sync_data(descriptor)
        drop_cached_pages(descriptor)
    finally:
        os.close(descriptor)


def _encode_line(entry: Mapping[str, object]) -> bytes:
    text = json.dumps(entry, separators=(",", ":")).encode() + b"\n"
    return _checksum(text) + b" " + text


def _checksum(text: bytes) -> bytes:
    return b"%08x" % zlib.crc32(text)
