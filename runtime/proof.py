"""Assertions that `python -O` does not remove."""

from __future__ import annotations

__all__ = ["prove"]


def prove(condition: bool, message: str) -> None:
    """Raise unless an invariant of our own work holds, whatever optimization level Python runs at.

    Raises:
        AssertionError: the condition is false: a bug of migrator, never a mistake of its user.
    """
    if not condition:
        raise AssertionError(message)
