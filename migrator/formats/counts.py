"""Numbers of things in words."""

from __future__ import annotations

__all__ = ["format_count"]


def format_count(number: int, singular: str, plural: str = "") -> str:
    """Return a number with the noun that goes with it, `1 entry` or `1,200 entries`.

    Args:
        number: of things.
        singular: the noun for one of them.
        plural: for several, where it does not just end with an s.
    """
    return f"{number:,} {singular if number == 1 else plural or f'{singular}s'}"
