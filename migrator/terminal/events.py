"""A log of a long command's events, as JSON lines in a file that a scheduler can watch."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from migrator.terminal import console
from plans.errors import MigratorError, UsageError

__all__ = ["EventLog", "record_events"]

_PROGRESS_INTERVAL = 1.0


class EventLog:
    """Writes one line for each event, with its name and the time; nothing if there is no file.

    Args:
        stream: the open file, None to write nothing.
        on_error: called once with a message if the file cannot be written any more; the work goes on.
        common_fields: fields that every line has.
    """

    def __init__(
        self, stream: TextIO | None, on_error: Callable[[str], None] = lambda text: None, **common_fields: object
    ) -> None:
        self._stream = stream
        self._on_error = on_error
        self._common_fields = common_fields
        self._last = 0.0

    def emit(self, event: str, **data: object) -> None:
        """Write an event at once."""
        if self._stream is None:
            return
        try:
            self._stream.write(
                json.dumps({"event": event, "time": time.time(), **self._common_fields, **data}, default=str) + "\n"
            )
            self._stream.flush()
        except OSError as error:
            self._stream = None
            self._on_error(f"note: no more events are written: {error.strerror or error}")

    def progress(self, done: int, total: int, current: str) -> None:
        """Write the progress, at most once a second."""
        if time.monotonic() - self._last >= _PROGRESS_INTERVAL:
            self._last = time.monotonic()
            self.emit("progress", bytes_done=done, bytes_total=total, current=current)


@contextmanager
def record_events(path: Path | None) -> Iterator[EventLog]:
    """Append the events of the body to a file; if the body fails, the last event says so.

    Args:
        path: the file, created if it does not exist; None to record nothing.

    Raises:
        UsageError: the file cannot be written.
    """
    if path is None:
        yield EventLog(None)
        return
    try:
        stream = path.open("a", encoding="utf-8")
    except OSError as error:
        raise UsageError(
            f"{path}: cannot be written: {error.strerror}",
            hint="give --events a file in a folder that you can write to",
            path=str(path),
        ) from error
    with _closing(stream):
        events = EventLog(stream, console.say)
        try:
            yield events
        except MigratorError as error:
            summary = error.to_json(include_data=False)
            events.emit("failed", error=summary.pop("kind"), **summary, data=error.data)
            raise
        except BaseException as error:
            events.emit("failed", error=type(error).__name__, message=str(error))
            raise


@contextmanager
def _closing(stream: TextIO) -> Iterator[None]:
    """Close a stream; a failure to write to it was reported before."""
    try:
        yield
    finally:
        with suppress(OSError):
            stream.close()
