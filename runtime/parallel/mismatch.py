"""What a check of a model or checkpoint reports: one thing that is not as promised."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Mismatch"]


@dataclass(frozen=True)
class Mismatch:
    """One thing that is not as promised.

    Args:
        name: the parameter, buffer or plan entry.
        expected: in words.
        found: in words.
        rank: where, None when all ranks see the same.
    """

    name: str
    expected: str
    found: str
    rank: int | None = None

    def to_json(self) -> dict[str, object]:
        """Return the JSON form."""
        return {"name": self.name, "expected": self.expected, "found": self.found, "rank": self.rank}
