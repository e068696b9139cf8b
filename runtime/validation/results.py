"""What a validation answers: one value for each of its parts, and one JSON form."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from runtime.parallel.mismatch import Mismatch

__all__ = ["PARTS", "CheckResult", "ResultBuilder", "ValidationResult"]


PARTS = ("structure", "content", "forward", "backward", "generation")
"""In the order in which they are looked at; what a part says means little where one before it is wrong."""

_ESSENTIAL = PARTS[:3]
_UNCHECKED: Mapping[str, Any] = {"ok": None, "checked": 0, "mismatches": []}


@dataclass(frozen=True)
class CheckResult:
    """What one part of a validation found.

    Args:
        checked: how many things were looked at.
        mismatches: those that are not as they must be.
        numbers: what was measured, by name.
    """

    checked: int
    mismatches: tuple[Mismatch, ...] = ()
    numbers: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether something was looked at, and all of it is as it must be."""
        return self.checked > 0 and not self.mismatches

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form; a number that is not finite is null there."""
        rows = [row.to_json() for row in self.mismatches]
        numbers = {name: _replace_non_finite(value) for name, value in self.numbers.items()}
        return {"ok": self.ok, "checked": self.checked, "mismatches": rows, **numbers}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> CheckResult:
        """Read the JSON form that our own worker wrote."""
        numbers = {name: one for name, one in value.items() if name not in _UNCHECKED}
        return cls(value["checked"], tuple(Mismatch(**row) for row in value["mismatches"]), numbers)


@dataclass(frozen=True)
class ValidationResult:
    """What a validation found.

    Args:
        world_size: ranks that took part.
        checks: what was looked at, by part.
        skipped: why the other parts were not.
        device: where ranks computed.
        seconds: that each phase took on rank 0.
    """

    world_size: int
    checks: Mapping[str, CheckResult]
    skipped: Mapping[str, str] = field(default_factory=dict)
    device: str = "cpu"
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether structure, content and forward were looked at, and everything that was is as it must be."""
        return all(part in self.checks for part in _ESSENTIAL) and all(check.ok for check in self.checks.values())

    def to_json(self) -> dict[str, Any]:
        """Return the one JSON form of a validation; it has every part, looked at or not."""
        parts = {part: self.checks[part].to_json() if part in self.checks else dict(_UNCHECKED) for part in PARTS}
        return {
            "ok": self.ok,
            "world_size": self.world_size,
            "device": self.device,
            **parts,
            "skipped": dict(self.skipped),
            "seconds": dict(self.seconds),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ValidationResult:
        """Read the JSON form that our own worker wrote."""
        checks = {part: CheckResult.from_json(value[part]) for part in PARTS if value[part]["ok"] is not None}
        return cls(value["world_size"], checks, value["skipped"], value["device"], value["seconds"])


def _replace_non_finite(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True)
class ResultBuilder:
    """A result in the making.

    Args:
        device: where this rank computes.
        checks: what was looked at, by part.
        skipped: why other parts were not.
        seconds: by phase, on this rank.
    """

    device: torch.device
    checks: dict[str, CheckResult] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def add(self, part: str, found: CheckResult | str) -> None:
        """Take what was found of a part, or why it was not looked at."""
        if isinstance(found, str):
            self.skip(found, part)
        else:
            self.checks[part] = found

    def skip(self, reason: str, *parts: str) -> None:
        """Say why parts are not looked at."""
        self.skipped.update(dict.fromkeys(parts, reason))

    @contextmanager
    def time_phase(self, phase: str) -> Iterator[None]:
        """Add the seconds that the body takes to a phase, what the device has still to do included."""
        began = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - began
