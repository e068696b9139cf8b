"""Calls of functions as a measure of work and of progress, which no busy or slow machine changes."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from types import FrameType

__all__ = ["count_calls", "observe_steps"]


@contextmanager
def observe_steps(observe: Callable[[str], object]) -> Iterator[None]:
    """Call a function with every step of this thread and of those it starts: "call", "return", "c_call" and so on."""

    def profile(frame: FrameType, event: str, argument: object) -> None:
        observe(event)

    threading.setprofile(profile)
    sys.setprofile(profile)
    try:
        yield
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


@contextmanager
def count_calls() -> Iterator[Callable[[], int]]:
    """Count the calls of Python functions; yields a function that returns their number so far."""
    numbers, calls = count(1), 0

    def add(step: str) -> None:
        nonlocal calls
        if step == "call":
            calls = next(numbers)

    with observe_steps(add):
        yield lambda: calls
