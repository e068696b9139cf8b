"""What verifying a checkpoint comes to: plain values with one JSON form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from runtime.checkpoint.content import SourceLayout, TensorInfo
from runtime.checkpoint.verifying.copies import Replicas, TensorCopy
from runtime.checkpoint.verifying.differences import CheckpointDifference

__all__ = ["Verification", "VerifiedCheckpoint"]


@dataclass(frozen=True)
class VerifiedCheckpoint:
    """A checkpoint as it was found.

    Args:
        folder: where it lies.
        replicas: what it holds, None where its files contradict one another.
        digests: of all copies, empty where nothing of them was read.
    """

    folder: Path
    replicas: Replicas | None = field(default=None, repr=False)
    digests: Mapping[TensorCopy, str] = field(default_factory=dict, repr=False)

    @property
    def layout(self) -> SourceLayout | None:
        """How it lies in the folder."""
        return self.replicas.checkpoint.layout if self.replicas else None

    @property
    def manifest_digests(self) -> Mapping[str, str]:
        """The digests that the checkpoint itself records, by tensor; empty in hub form."""
        return self.replicas.checkpoint.digests if self.replicas else {}

    def intact_copies(self) -> Mapping[str, TensorCopy]:
        """Return one copy of each tensor that was read: one with the recorded digest where there is such."""
        copies = {copy.name: copy for copy in reversed(list(self.digests))}
        return copies | {c.name: c for c, digest in self.digests.items() if digest == self.manifest_digests.get(c.name)}

    def get_tensor_info(self, name: str) -> TensorInfo:
        """Return a tensor that it holds."""
        assert self.replicas is not None
        return self.replicas.checkpoint.all_tensors[name]

    def to_json(self) -> dict[str, object]:
        """Return what was looked at, for other programs."""
        content = self.replicas.checkpoint if self.replicas else None
        return {
            "folder": str(self.folder),
            "layout": self.layout,
            "tensors": len(content.tensors) if content else 0,
            "optimizer_tensors": len(content.optimizer.tensors) if content and content.optimizer else 0,
            "copies": len(self.replicas.copies) if self.replicas else 0,
            "digests_read": len(self.digests),
            "digests_recorded": len(self.manifest_digests),
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

    source: VerifiedCheckpoint
    other: VerifiedCheckpoint | None
    differences: tuple[CheckpointDifference, ...]
    seconds: float

    @property
    def against(self) -> Literal["checkpoint", "manifest", "headers"]:
        """What the source was held against: another one, its manifest's digests, or, for want of those, its headers."""
        if self.other is not None:
            return "checkpoint"
        return "manifest" if self.source.manifest_digests else "headers"

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
