"""Signals during a step that writes nothing: it is ended at once, because it can simply be run again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from runtime.checkpoint.copying.signals import catch_stop_signals, handle_signals

__all__ = ["Interrupted", "interruptible"]


class Interrupted(KeyboardInterrupt):
    """A signal ended a step.

    Args:
        name: the signal's name.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


@contextmanager
def interruptible() -> Iterator[None]:
    """Let SIGINT and SIGTERM end the body, including any that arrived before it; in the main thread only.

    Raises:
        Interrupted: a signal arrived.
    """
    with catch_stop_signals() as stop:

        def end(number: int, frame: FrameType | None) -> None:
            previous[number](number, frame)  # Enclosing code must learn of the signal too.
            check()

        def check() -> None:
            if (name := stop()) is not None:
                raise Interrupted(name)

        with handle_signals(end) as previous:
            check()
            yield
