"""The result of a verification: each difference between what a checkpoint contains and what it should contain."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from plans.errors import IncompleteError, MigratorError
from runtime.checkpoint.checkpoint import Checkpoint, SourceLayout, TensorCopy, TensorInfo

if TYPE_CHECKING:
    from runtime.checkpoint.verifying.elements import ElementDifference
    from runtime.checkpoint.verifying.independent import IndependentReading

__all__ = [
    "Aspect",
    "CheckpointDifference",
    "Verification",
    "VerifiedCheckpoint",
    "compare_tensors",
    "extract_differences",
]


Aspect = Literal["files", "lossy", "missing", "kind", "dtype", "shape", "tied", "content", "config"]
"""What differs: `files` contradict one another, `content` is a tensor's bytes, `config` an entry of config.json that
changes what the model computes.
"""


@dataclass(frozen=True)
class CheckpointDifference:
    """One difference between what a checkpoint contains and what it should contain.

    Args:
        name: the tensor or the entry of the config, or the folder if the difference concerns neither.
        aspect: what differs.
        expected: what it should be, in words.
        found: what it is, in words.
        where: the files that contain what was found, in words.
        element: the first element that differs, if there is a copy to compare with.
        against: the copy that the element was compared with, in words.
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
        if self.aspect == "missing":
            has, lacks = (
                ("the second", "the first") if self.found == _describe_presence(False) else ("the first", "the second")
            )
            return f"{self.name}: only {has} checkpoint has it, {lacks} does not"
        text = f"{self.name}{where}: {self.aspect} {self.found} instead of {self.expected}"
        if self.element is None:
            return text
        index, found, expected = list(self.element.index), self.element.found, self.element.expected
        return f"{text}; the first element that differs, {index}, is {found}, but {expected} in {self.against}"

    def to_json(self) -> dict[str, object]:
        """Return the JSON form."""
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
    """Yield the differences between two checkpoints' headers: names, kinds, dtypes, shapes and ties.

    An optimizer's state that only one of them has is one difference.

    Args:
        reference: the checkpoint that the other one should equal.
        candidate: the checkpoint to compare with it.
    """
    both = reference.optimizer is not None and candidate.optimizer is not None
    expected, found = (side.all_tensors if both else side.tensors for side in (reference, candidate))
    for name in _merge_names(expected, found):
        if name in expected and name in found:
            yield from _compare_tensor(name, expected[name], found[name])
        else:
            held = _describe_presence(name in expected), _describe_presence(name in found)
            yield CheckpointDifference(name, "missing", *held)
    if (reference.optimizer is None) != (candidate.optimizer is None):
        held = _describe_presence(reference.optimizer is not None), _describe_presence(candidate.optimizer is not None)
        yield CheckpointDifference("the optimizer's state", "missing", *held)
    for name in _merge_names(reference.tied, candidate.tied):
        if reference.tied.get(name) != candidate.tied.get(name):
            yield CheckpointDifference(name, "tied", _describe_tie(reference, name), _describe_tie(candidate, name))


def extract_differences(error: MigratorError, folder: str) -> list[CheckpointDifference]:
    """Return the differences in an error about files that contradict one another or do not make up whole tensors.

    Args:
        error: the error that reading the checkpoint raised.
        folder: the checkpoint's folder.

    Raises:
        MigratorError: the error itself, if it means that the checkpoint could not be verified.
    """
    lossy = error.data.get("lossy")
    if isinstance(lossy, Mapping):
        return [
            CheckpointDifference(
                name, "lossy", f"{total} elements", f"only {stored} of {total} elements are stored", folder
            )
            for name, (stored, total) in lossy.items()
        ]
    if isinstance(error, IncompleteError):
        raise error
    return [CheckpointDifference(folder, "files", "files of one checkpoint", error.message)]


def _compare_tensor(name: str, expected: TensorInfo, found: TensorInfo) -> Iterator[CheckpointDifference]:
    aspects: tuple[Aspect, ...] = ("kind", "dtype", "shape")
    for aspect in aspects:
        values = str(getattr(expected, aspect)), str(getattr(found, aspect))
        if values[0] != values[1]:
            yield CheckpointDifference(name, aspect, *values)


def _describe_presence(is_held: bool) -> str:
    return "held" if is_held else "not held"


def _describe_tie(checkpoint: Checkpoint, name: str) -> str:
    return f"to {checkpoint.tied[name]}" if name in checkpoint.tied else "not tied"


def _merge_names(one: Mapping[str, object], other: Mapping[str, object]) -> list[str]:
    return list(dict.fromkeys([*one, *other]))


@dataclass(frozen=True)
class VerifiedCheckpoint:
    """One side of a verification.

    Args:
        folder: the checkpoint's folder.
        checkpoint: the checkpoint, None if its files contradict one another.
        copies: all copies of its tensors.
        digests: the digest of each copy, empty if no tensor was read.
        independent: what another program reads of it, None if none was asked.
    """

    folder: Path
    checkpoint: Checkpoint | None = field(default=None, repr=False)
    copies: Sequence[TensorCopy] = field(default=(), repr=False)
    digests: Mapping[TensorCopy, str] = field(default_factory=dict, repr=False)
    independent: IndependentReading | None = field(default=None, repr=False)

    @property
    def layout(self) -> SourceLayout | None:
        """The layout of its files."""
        return self.checkpoint.layout if self.checkpoint else None

    @property
    def manifest_digests(self) -> Mapping[str, str]:
        """The digests that its manifest records, by tensor; empty without a manifest."""
        return self.checkpoint.digests if self.checkpoint else {}

    def intact_copies(self) -> Mapping[str, TensorCopy]:
        """Return one copy of each tensor that was read, one with the recorded digest if there is any."""
        copies = {copy.name: copy for copy in reversed(list(self.digests))}
        return copies | {c.name: c for c, digest in self.digests.items() if digest == self.manifest_digests.get(c.name)}

    def to_json(self) -> dict[str, object]:
        """Return the JSON form: what was verified, in numbers."""
        checkpoint = self.checkpoint
        return {
            "folder": str(self.folder),
            "layout": self.layout,
            "tensors": len(checkpoint.tensors) if checkpoint else 0,
            "optimizer_tensors": len(checkpoint.optimizer.tensors) if checkpoint and checkpoint.optimizer else 0,
            "copies": len(self.copies),
            "digests_read": len(self.digests),
            "digests_recorded": len(self.manifest_digests),
            "independent": self.independent.to_json() if self.independent else None,
        }


@dataclass(frozen=True)
class Verification:
    """The result of verifying a checkpoint.

    Args:
        source: the checkpoint.
        other: the checkpoint that it was compared with, None if it was verified against its manifest.
        differences: all differences.
        seconds: the seconds that it took.
    """

    source: VerifiedCheckpoint
    other: VerifiedCheckpoint | None
    differences: tuple[CheckpointDifference, ...]
    seconds: float

    @property
    def against(self) -> Literal["checkpoint", "manifest", "headers"]:
        """What the source was verified against: another checkpoint, its manifest's digests, or only its headers."""
        if self.other is not None:
            return "checkpoint"
        return "manifest" if self.source.manifest_digests else "headers"

    @property
    def ok(self) -> bool:
        """Whether there are no differences."""
        return not self.differences

    def to_json(self) -> dict[str, object]:
        """Return the JSON form."""
        return {
            "ok": self.ok,
            "against": self.against,
            "source": self.source.to_json(),
            "other": self.other.to_json() if self.other else None,
            "differences": [difference.to_json() for difference in self.differences],
            "seconds": self.seconds,
        }
