"""Differences between what a checkpoint holds and what it should: values that a command prints and programs read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from plans.errors import IncompleteError, MigratorError
from runtime.checkpoint.checkpoint import Checkpoint, SourceLayout, TensorInfo
from runtime.checkpoint.verifying.replicas import Replicas, TensorCopy

if TYPE_CHECKING:
    from runtime.checkpoint.verifying.elements import ElementDifference

__all__ = [
    "Aspect",
    "CheckpointDifference",
    "Verification",
    "VerifiedCheckpoint",
    "compare_tensors",
    "extract_differences",
]


Aspect = Literal["files", "lossy", "missing", "kind", "dtype", "shape", "tied", "content", "config"]
"""In what something differs: `files` contradict one another, `content` is the bytes of a tensor.

`config` is an entry of config.json that says what the model computes.
"""


@dataclass(frozen=True)
class CheckpointDifference:
    """One thing that is not as it should be.

    Args:
        name: of the tensor or the config's entry, or of the folder where it is of no single one.
        aspect: in what it differs.
        expected: in words.
        found: in words.
        where: whose files hold what was found, in words.
        element: the first one that differs, where there is something to compare with.
        against: what the element was compared with, in words.
    """

    name: str
    aspect: Aspect
    expected: str
    found: str
    where: str = ""
    element: ElementDifference | None = None
    against: str = ""

    def __str__(self) -> str:
        if self.aspect in ("files", "lossy"):
            return self.found if self.aspect == "files" else f"{self.name}: lossy, {self.found}"
        where = f" in {self.where}" if self.where else ""
        text = f"{self.name}{where}: {self.aspect} {self.found} instead of {self.expected}"
        if self.element is None:
            return text
        index, found, expected = list(self.element.index), self.element.found, self.element.expected
        return f"{text}; the first element that differs, {index}, is {found}, but {expected} in {self.against}"

    def to_json(self) -> dict[str, object]:
        """Return the difference for other programs."""
        return {
            "name": self.name,
            "aspect": self.aspect,
            "expected": self.expected,
            "found": self.found,
            "where": self.where,
            "element": self.element.to_json() if self.element else None,
            "against": self.against,
        }


def compare_tensors(reference: Checkpoint, candidate: Checkpoint) -> Iterator[CheckpointDifference]:
    """Yield in what the tensors of two checkpoints differ before any byte is read: names, kinds, dtypes, shapes, ties.

    An optimizer's state that only one of them holds is one difference.

    Args:
        reference: whose tensors are expected.
        candidate: whose tensors are found.
    """
    both = reference.optimizer is not None and candidate.optimizer is not None
    held = reference.all_tensors if both else reference.tensors, candidate.all_tensors if both else candidate.tensors
    for name in _merge_names(*held):
        if name in held[0] and name in held[1]:
            yield from _compare_tensor(name, held[0][name], held[1][name])
        else:
            expected, found = ("held" if name in side else "not held" for side in held)
            yield CheckpointDifference(name, "missing", expected, found)
    if (reference.optimizer is None) != (candidate.optimizer is None):
        expected, found = ("not held" if side.optimizer is None else "held" for side in (reference, candidate))
        yield CheckpointDifference("the optimizer's state", "missing", expected, found)
    for name in _merge_names(reference.tied, candidate.tied):
        wanted, has = (f"to {side.tied[name]}" if name in side.tied else "not tied" for side in (reference, candidate))
        if wanted != has:
            yield CheckpointDifference(name, "tied", wanted, has)


def extract_differences(error: MigratorError, folder: str) -> list[CheckpointDifference]:
    """Return what an error says of a checkpoint whose files contradict one another or do not make up its tensors.

    Args:
        error: of its reader.
        folder: of the checkpoint.

    Raises:
        MigratorError: the error itself where it is that the work could not be done.
    """
    lossy = error.data.get("lossy")
    if isinstance(lossy, Mapping):
        return [
            CheckpointDifference(
                name, "lossy", f"{whole} elements", f"only {held} of {whole} elements are stored", folder
            )
            for name, (held, whole) in lossy.items()
        ]
    if isinstance(error, IncompleteError):
        raise error
    return [CheckpointDifference(folder, "files", "files of one checkpoint", error.message)]


def _compare_tensor(name: str, expected: TensorInfo, found: TensorInfo) -> Iterator[CheckpointDifference]:
    aspects: tuple[Aspect, ...] = ("kind", "dtype", "shape")
    for aspect in aspects:
        wanted, has = (str(getattr(tensor, aspect)) for tensor in (expected, found))
        if wanted != has:
            yield CheckpointDifference(name, aspect, wanted, has)


def _merge_names(one: Mapping[str, object], other: Mapping[str, object]) -> list[str]:
    return list(dict.fromkeys([*one, *other]))


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
