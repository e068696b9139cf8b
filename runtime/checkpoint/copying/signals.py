"""Stop on signals: the first one asks the work to end where the next run can continue; a second one forces it."""

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
"""Returns the name of the signal that asked to stop, or None."""

Handler = Callable[[int, FrameType | None], None]

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class _StopRequest:
    """A handler that notes the first signal; a second one goes to the handler that was there before."""

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
    """Catch SIGINT and SIGTERM, and give a function that returns the name of the one that asked to stop, or None.

    A nested call gives a function with the same answer, so that an earlier signal is not lost. Only the main thread
    can catch signals; in other threads this does nothing.
    """
    outer = signal.getsignal(signal.SIGTERM)
    if isinstance(outer, _StopRequest):
        yield lambda: outer.name
        return
    request = _StopRequest()
    with handle_signals(request) as request.previous:
        yield lambda: request.name


@contextmanager
def handle_signals(handler: Handler) -> Iterator[Mapping[int, Any]]:
    """Install a handler for SIGINT and SIGTERM during the body, and give the previous handlers.

    Only the main thread can handle signals; in other threads this does nothing.
    """
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        # A handler that was not installed from Python cannot be restored.
        before = {
            number: handler_before for number in _SIGNALS if (handler_before := signal.getsignal(number)) is not None
        }
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
    """Stop if a signal asked to, at a point where all tensors are safe but nothing is committed.

    Args:
        stop: returns the name of the signal that asked to stop, or None.
        folder: the folder of the tensors.

    Raises:
        CheckpointError: a signal asked to stop.
    """
    if (name := stop()) is not None:
        raise CheckpointError(
            f"stopped by {name}; all tensors are safe in {folder}",
            hint="run the same command again to continue from there",
            signal=name,
        )
