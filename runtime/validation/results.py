"""A validation's results: one value for each part, with one JSON form, and the builder that collects them."""

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
"""The parts in the order in which they run; a part says little if an earlier one failed."""

_ESSENTIAL = PARTS[:3]
_UNCHECKED: Mapping[str, Any] = {"ok": None, "checked": 0, "mismatches": []}


@dataclass(frozen=True)
class CheckResult:
    """The result of one part of a validation.

    Args:
        checked: how many things were compared.
        mismatches: those that differ.
        numbers: measurements by name.
    """

    checked: int
    mismatches: tuple[Mismatch, ...] = ()
    numbers: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether something was compared, and nothing differs."""
        return self.checked > 0 and not self.mismatches

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form, in which numbers that are not finite are null."""
        rows = [row.to_json() for row in self.mismatches]
        numbers = {name: _replace_non_finite(value) for name, value in self.numbers.items()}
        return {"ok": self.ok, "checked": self.checked, "mismatches": rows, **numbers}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> CheckResult:
        """Read the JSON form that a worker wrote."""
        numbers = {name: number for name, number in value.items() if name not in _UNCHECKED}
        return cls(value["checked"], tuple(Mismatch(**row) for row in value["mismatches"]), numbers)


@dataclass(frozen=True)
class ValidationResult:
    """The result of a validation.

    Args:
        world_size: the number of ranks.
        checks: the results by part.
        skipped: the reasons why other parts were skipped, by part.
        device: the kind of device that ranks computed on.
        seconds: the time that each phase took on rank 0.
    """

    world_size: int
    checks: Mapping[str, CheckResult]
    skipped: Mapping[str, str] = field(default_factory=dict)
    device: str = "cpu"
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether structure, content and forward were checked, and every check that ran passed."""
        return all(part in self.checks for part in _ESSENTIAL) and all(check.ok for check in self.checks.values())

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form, which has every part, checked or not."""
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
        """Read the JSON form that a worker wrote."""
        checks = {part: CheckResult.from_json(value[part]) for part in PARTS if value[part]["ok"] is not None}
        return cls(value["world_size"], checks, value["skipped"], value["device"], value["seconds"])


def _replace_non_finite(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True)
class ResultBuilder:
    """Collects the results of a validation as it runs.

    Args:
        device: the device that this rank computes on.
        checks: the results so far, by part.
        skipped: the reasons why parts were skipped, by part.
        seconds: the time that each phase took on this rank.
    """

    device: torch.device
    checks: dict[str, CheckResult] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def add(self, part: str, result: CheckResult | str) -> None:
        """Add the result of a part, or the reason why it was skipped."""
        if isinstance(result, str):
            self.skip(result, part)
        else:
            self.checks[part] = result

    def skip(self, reason: str, *parts: str) -> None:
        """Record why parts are skipped."""
        self.skipped.update(dict.fromkeys(parts, reason))

    @contextmanager
    def time_phase(self, phase: str) -> Iterator[None]:
        """Add the time that the body takes to a phase, including pending work of the device."""
        began = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - began
