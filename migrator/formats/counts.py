"""Numbers of things in words."""

from __future__ import annotations

__all__ = ["counted"]


def counted(number: int, one: str, many: str = "") -> str:
    """Return a number with the noun that goes with it, `1 entry` or `1,200 entries`.

    Args:
        number: of things.
        one: the noun for one of them.
        many: for several, where it does not just end with an s.
    """
    return f"{number:,} {one if number == 1 else many or f'{one}s'}"
