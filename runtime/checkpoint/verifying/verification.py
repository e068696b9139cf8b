"""What verifying a checkpoint comes to: plain values with one JSON form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from runtime.checkpoint.content import FoundLayout, Held
from runtime.checkpoint.verifying.copies import Holding, TensorCopy
from runtime.checkpoint.verifying.differences import Difference

__all__ = ["Verification", "Verified"]


@dataclass(frozen=True)
class Verified:
    """A checkpoint as it was found.

    Args:
        folder: where it lies.
        holding: what it holds, None where its files contradict one another.
        digests: of all copies, empty where nothing of them was read.
    """

    folder: Path
    holding: Holding | None = field(default=None, repr=False)
    digests: Mapping[TensorCopy, str] = field(default_factory=dict, repr=False)

    @property
    def layout(self) -> FoundLayout | None:
        """How it lies in the folder."""
        return self.holding.content.layout if self.holding else None

    @property
    def recorded(self) -> Mapping[str, str]:
        """The digests that the checkpoint itself records, by tensor; empty in hub form."""
        return self.holding.content.digests if self.holding else {}

    def intact_copies(self) -> Mapping[str, TensorCopy]:
        """Return one copy of each tensor that was read: one with the recorded digest where there is such."""
        copies = {copy.name: copy for copy in reversed(list(self.digests))}
        return copies | {c.name: c for c, digest in self.digests.items() if digest == self.recorded.get(c.name)}

    def held(self, name: str) -> Held:
        """Return a tensor that it holds."""
        assert self.holding is not None
        return self.holding.content.all_tensors[name]

    def to_json(self) -> dict[str, object]:
        """Return what was looked at, for other programs."""
        content = self.holding.content if self.holding else None
        return {
            "folder": str(self.folder),
            "layout": self.layout,
            "tensors": len(content.tensors) if content else 0,
            "optimizer_tensors": len(content.optimizer.tensors) if content and content.optimizer else 0,
            "copies": len(self.holding.copies) if self.holding else 0,
            "digests_read": len(self.digests),
            "digests_recorded": len(self.recorded),
        }


@dataclass(frozen=True)
class Verification:
    """What came of verifying a checkpoint.

    Args:
        source: the checkpoint.
        other: what it was compared with, None where that was its manifest.
        differences: everything that is not as it should be.
        seconds: it took.
    """

    source: Verified
    other: Verified | None
    differences: tuple[Difference, ...]
    seconds: float

    @property
    def against(self) -> Literal["checkpoint", "manifest", "headers"]:
        """What the source was held against: another one, its manifest's digests, or, for want of those, its headers."""
        if self.other is not None:
            return "checkpoint"
        return "manifest" if self.source.recorded else "headers"

    @property
    def ok(self) -> bool:
        """Whether nothing differs."""
        return not self.differences

    def to_json(self) -> dict[str, object]:
        """Return the result for other programs."""
        return {
            "ok": self.ok,
            "against": self.against,
            "source": self.source.to_json(),
            "other": self.other.to_json() if self.other else None,
            "differences": [difference.to_json() for difference in self.differences],
            "seconds": self.seconds,
        }
