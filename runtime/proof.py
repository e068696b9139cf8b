"""Proofs that always run: unlike `assert`, they do not vanish when Python optimizes."""

from __future__ import annotations

__all__ = ["prove"]


def prove(condition: bool, message: str) -> None:
    """Stop before harm is done where our own work is not what it must be.

    Raises:
        AssertionError: the condition does not hold; the fault is ours, never the user's.
    """
    if not condition:
        raise AssertionError(message)
