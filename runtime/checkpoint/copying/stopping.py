"""Being told to stop: the first signal asks for it, so that work ends where it can go on; a second one insists."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from plans.errors import CheckpointError

__all__ = ["Stop", "check_not_stopped", "stoppable"]

Stop = Callable[[], str | None]
"""Returns the name of the signal that asked to stop, None as long as there was none."""

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def stoppable() -> Iterator[Stop]:
    """Give a function that returns the name of the signal that asked to stop, None as long as there was none.

    Only the main thread can be asked; elsewhere signals do what they did before.
    """
    asked: list[str] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return

    def ask(number: int, frame: FrameType | None) -> None:
        asked.append(signal.Signals(number).name)
        restore()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    # A handler that was not set from Python cannot be put back.
    before = {number: handler for number in _SIGNALS if (handler := signal.getsignal(number)) is not None}
    try:
        for number in before:
            signal.signal(number, ask)
        yield lambda: asked[0] if asked else None
    finally:
        restore()


def check_not_stopped(stop: Stop, folder: Path) -> None:
    """End here if a signal asked to, where all tensors are safe but nothing is committed yet.

    Args:
        stop: whether one did.
        folder: that they are in.

    Raises:
        CheckpointError: one did.
    """
    if (signal := stop()) is not None:
        raise CheckpointError(
            f"stopped by {signal}; all tensors are safe in {folder}",
            hint="run the same command again, and it goes on from there",
            signal=signal,
        )
