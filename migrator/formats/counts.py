"""Numbers of things in words."""

from __future__ import annotations

__all__ = ["counted"]


def counted(number: int, one: str, many: str) -> str:
    """Return a number with the noun that goes with it, `1 entry` or `1,200 entries`."""
    return f"{number:,} {one if number == 1 else many}"
