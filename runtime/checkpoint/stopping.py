"""Being told to stop: the first signal asks for it, so that work ends where it can go on; a second one insists."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["stoppable"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def stoppable() -> Iterator[Callable[[], str | None]]:
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
