"""One difference between what a plan or checkpoint promises and what was found. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Mismatch"]


@dataclass(frozen=True)
class Mismatch:
    """One difference between what was promised and what was found.

    Args:
        name: the parameter, buffer or plan entry.
        expected: what was promised, in words.
        found: what was found, in words.
        rank: the rank that found it, None if it is the same on all ranks.
    """

    name: str
    expected: str
    found: str
    rank: int | None = None

    def to_json(self) -> dict[str, object]:
        """Return the JSON form."""
        return {"name": self.name, "expected": self.expected, "found": self.found, "rank": self.rank}
