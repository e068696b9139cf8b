"""What a validation is asked and what it answers: plain values with one JSON form."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from plans.errors import UsageError
from plans.mesh import Mesh
from runtime.structure import Mismatch

__all__ = ["Content", "Forward", "Structure", "ValidationRequest", "ValidationResult"]

_NO_FORWARD = {"ok": False, "max_abs_diff": None}
"""The JSON form where the forward was not looked at, so that what reads it always finds the same keys."""


@dataclass(frozen=True)
class ValidationRequest:
    """One validation.

    Args:
        folder: of rank files.
        mesh: that they must be laid out for.
        reference: a checkpoint of the same model, in hub form or as rank files; None reassembles the folder itself.
        tolerance: accepted difference of logits in float32, relative to the largest of the reference's; in (0, 1).
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

    def __post_init__(self) -> None:
        if not 0 < self.tolerance < 1:
            raise UsageError(
                f"{self.tolerance} is not a tolerance: it is relative to the largest output",
                hint="give one between 0 and 1, such as 1e-5",
                tolerance=self.tolerance,
            )

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
        max_abs_diff: of the outputs, over all ranks; infinite where one of them is not a number.
        max_abs_reference: the largest of the reference's outputs.
        tolerance: relative to that.
        compared: which output, `logits`, or `last_hidden_state` of a model without a head.
        reason: why nothing could be compared, None where it was.
    """

    max_abs_diff: float
    max_abs_reference: float
    tolerance: float
    compared: str = "logits"
    reason: str | None = None

    @classmethod
    def failed(cls, reason: str, tolerance: float) -> Forward:
        """Return the verdict on a model that computed nothing."""
        return cls(math.inf, math.inf, tolerance, reason=reason)

    @property
    def ok(self) -> bool:
        """Whether something was compared and the difference is within the tolerance."""
        return (
            self.reason is None
            and math.isfinite(self.max_abs_diff)
            and 0 < self.max_abs_reference < math.inf
            and self.max_abs_diff <= self.tolerance * self.max_abs_reference
        )

    def to_json(self) -> dict[str, object]:
        """Return the JSON form; what is not finite is null there."""
        return {
            "ok": self.ok,
            "max_abs_diff": _json_number(self.max_abs_diff),
            "max_abs_reference": _json_number(self.max_abs_reference),
            "tolerance": self.tolerance,
            "compared": self.compared,
            "reason": self.reason,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Forward:
        """Read the JSON form that our own worker wrote."""
        return cls(
            _number(value["max_abs_diff"]),
            _number(value["max_abs_reference"]),
            value["tolerance"],
            value["compared"],
            value["reason"],
        )


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

    @classmethod
    def refuted(cls, world_size: int, reason: str) -> ValidationResult:
        """Return the result where the files contradict each other, before there was a model to look at."""
        return cls(world_size, Structure(0), skipped=dict.fromkeys(("structure", "content", "forward"), reason))

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
            "forward": self.forward.to_json() if self.forward else _NO_FORWARD,
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
            Forward.from_json(forward) if forward != _NO_FORWARD else None,
            value["skipped"],
        )


def _json_number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _number(value: float | None) -> float:
    return math.inf if value is None else value
