"""Being told to stop: the first signal asks for it, so that work ends where it can go on; a second one insists."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from plans.errors import CheckpointError

__all__ = ["Stop", "catch_stop_signals", "check_not_stopped", "handle_signals"]

Stop = Callable[[], str | None]
"""Returns the name of the signal that asked to stop, None as long as there was none."""

Handler = Callable[[int, FrameType | None], None]

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class _StopRequest:
    """The handler that takes the first signal for a request; a second one does what it did before."""

    def __init__(self) -> None:
        self.name: str | None = None
        self.previous: Mapping[int, Any] = {}

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.name is None:
            self.name = signal.Signals(number).name
        else:
            _restore_handlers(self.previous)
            signal.raise_signal(number)


@contextmanager
def catch_stop_signals() -> Iterator[Stop]:
    """Give a function that returns the name of the signal that asked to stop, None as long as there was none.

    Within another such body it is the same function, so that a signal that came before is not lost. Only the main
    thread can be asked; elsewhere signals do what they did before.
    """
    around = signal.getsignal(signal.SIGTERM)
    if isinstance(around, _StopRequest):
        yield lambda: around.name
        return
    asked = _StopRequest()
    with handle_signals(asked) as asked.previous:
        yield lambda: asked.name


@contextmanager
def handle_signals(handler: Handler) -> Iterator[Mapping[int, Any]]:
    """Let a handler take SIGINT and SIGTERM during the body, and give those that were there before.

    Only the main thread's; elsewhere signals do what they did before.
    """
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        # A handler that was not set from Python cannot be put back.
        before = {number: known for number in _SIGNALS if (known := signal.getsignal(number)) is not None}
    try:
        for number in before:
            signal.signal(number, handler)
        yield before
    finally:
        _restore_handlers(before)


def _restore_handlers(handlers: Mapping[int, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)


def check_not_stopped(stop: Stop, folder: Path) -> None:
    """End here if a signal asked to, where all tensors are safe but nothing is committed yet.

    Args:
        stop: whether one did.
        folder: that they are in.

    Raises:
        CheckpointError: one did.
    """
    if (asked_by := stop()) is not None:
        raise CheckpointError(
            f"stopped by {asked_by}; all tensors are safe in {folder}",
            hint="run the same command again, and it goes on from there",
            signal=asked_by,
        )
