"""Signals while a step runs that writes nothing: it ends at once, for it can be begun again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from runtime.checkpoint.copying.signals import catch_stop_signals, handle_signals

__all__ = ["Interrupted", "interruptible"]


class Interrupted(KeyboardInterrupt):
    """A signal ended a step.

    Args:
        name: of the signal.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


@contextmanager
def interruptible() -> Iterator[None]:
    """Let SIGINT and SIGTERM end the body, those that came before it included; only the main thread's.

    Raises:
        Interrupted: one came.
    """
    with catch_stop_signals() as stop:

        def end(number: int, frame: FrameType | None) -> None:
            before[number](number, frame)  # so that all around the body know of it
            check()

        def check() -> None:
            if (name := stop()) is not None:
                raise Interrupted(name)

        with handle_signals(end) as before:
            check()
            yield
