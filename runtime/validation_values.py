"""What a validation is asked and what it answers: plain values with one JSON form."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from plans.mesh import Mesh
from runtime.structure import Mismatch

__all__ = ["Content", "Forward", "Structure", "ValidationRequest", "ValidationResult"]


@dataclass(frozen=True)
class ValidationRequest:
    """One validation.

    Args:
        folder: of rank files.
        mesh: that they must be laid out for.
        reference: a checkpoint of the same model, in hub form or as rank files; None reassembles the folder itself.
        tolerance: accepted difference of logits in float32, relative to the largest of the reference's.
        timeout: seconds that the workers may take.
        batch: rows of tokens.
        sequence: tokens in a row.
        seed: of the tokens.
    """

    folder: Path
    mesh: Mesh
    reference: Path | None = None
    tolerance: float = 1e-5
    timeout: float = 1800.0
    batch: int = 2
    sequence: int = 16
    seed: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form, paths absolute."""
        return {
            "folder": str(self.folder.absolute()),
            "mesh": {"tp": self.mesh.tp, "ep": self.mesh.ep, "fsdp": self.mesh.fsdp},
            "reference": str(self.reference.absolute()) if self.reference else None,
            "tolerance": self.tolerance,
            "timeout": self.timeout,
            "batch": self.batch,
            "sequence": self.sequence,
            "seed": self.seed,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> ValidationRequest:
        """Read the JSON form that our own parent process wrote."""
        reference = value["reference"]
        return cls(
            **{
                **value,
                "folder": Path(value["folder"]),
                "mesh": Mesh(**value["mesh"]),
                "reference": Path(reference) if reference else None,
            }
        )


@dataclass(frozen=True)
class Structure:
    """Whether the model is sharded as planned: tensors checked, on each rank, and what is not so."""

    checked: int
    mismatches: tuple[Mismatch, ...] = ()


@dataclass(frozen=True)
class Content:
    """Whether the rank files together hold the bytes that the manifest's digests speak of."""

    checked: int = 0
    mismatches: tuple[Mismatch, ...] = ()


@dataclass(frozen=True)
class Forward:
    """Whether the parallel model computes what the unsharded one does.

    Args:
        max_abs_diff: of the logits, over all ranks; infinite where one of them is not a number.
        max_abs_reference: the largest of the reference's logits.
        tolerance: relative to that.
    """

    max_abs_diff: float
    max_abs_reference: float
    tolerance: float

    @property
    def ok(self) -> bool:
        """Whether the difference is within the tolerance."""
        return self._finite and self.max_abs_diff <= self.tolerance * self.max_abs_reference

    @property
    def _finite(self) -> bool:
        return math.isfinite(self.max_abs_diff) and math.isfinite(self.max_abs_reference)

    def to_json(self) -> dict[str, object]:
        """Return the JSON form; what is not finite is null there."""
        return {
            "ok": self.ok,
            "max_abs_diff": _json_number(self.max_abs_diff),
            "max_abs_reference": _json_number(self.max_abs_reference),
            "tolerance": self.tolerance,
        }


@dataclass(frozen=True)
class ValidationResult:
    """What a validation found.

    Args:
        world_size: ranks that took part.
        structure: first, because nothing after it means anything without it.
        content: second; None where the structure is wrong already.
        forward: last; None where the structure is wrong already.
        skipped: what was not looked at, and why.
    """

    world_size: int
    structure: Structure
    content: Content | None = None
    forward: Forward | None = None
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether everything was looked at and is as it must be."""
        return (
            not self.structure.mismatches
            and self.content is not None
            and not self.content.mismatches
            and self.forward is not None
            and self.forward.ok
        )

    def to_json(self) -> dict[str, Any]:
        """Return the one JSON form of a validation."""

        def part(value: Structure | Content | None) -> dict[str, object] | None:
            if value is None:
                return None
            return {"checked": value.checked, "mismatches": [row.to_json() for row in value.mismatches]}

        return {
            "ok": self.ok,
            "world_size": self.world_size,
            "structure": part(self.structure),
            "content": part(self.content),
            "forward": self.forward.to_json() if self.forward else None,
            "skipped": self.skipped,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> ValidationResult:
        """Read the JSON form that our own worker wrote."""

        def mismatches(part: dict[str, Any]) -> tuple[Mismatch, ...]:
            return tuple(Mismatch(**row) for row in part["mismatches"])

        content, forward = value["content"], value["forward"]
        return cls(
            value["world_size"],
            Structure(value["structure"]["checked"], mismatches(value["structure"])),
            Content(content["checked"], mismatches(content)) if content else None,
            Forward(
                _number(forward["max_abs_diff"]),
                _number(forward["max_abs_reference"]),
                forward["tolerance"],
            )
            if forward
            else None,
            value["skipped"],
        )


def _json_number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _number(value: float | None) -> float:
    return math.inf if value is None else value
