"""Words for one-line messages: what foreign errors say, and long lists of names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

__all__ = ["counted", "first_line", "listed", "shortened"]

_SHOWN = 3
_LONGEST = 120


def first_line(error: BaseException) -> str:
    """Return what an error says first, on one line; a line that only announces the next one goes with it."""
    return " ".join(_announced(str(error).splitlines())) or type(error).__name__


def counted(number: int, noun: str) -> str:
    """Return a number of things, `1 rank` or `2 ranks`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def listed(names: Sequence[str]) -> str:
    """Return the first few names, and how many more there are."""
    shown = ", ".join(repr(name) for name in names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"


def shortened(text: str) -> str:
    """Return a text that fits a line, its middle left out where it is longer."""
    half = _LONGEST // 2
    return text if len(text) <= _LONGEST else f"{text[:half]}…{text[-half:]}"


def _announced(lines: Sequence[str]) -> Iterator[str]:
    for line in filter(None, map(str.strip, lines)):
        yield line
        if not line.endswith(":"):
            return
