"""A validation's results: its parts, what was not exercised and the verdict, in one JSON form, and their builder."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from runtime.parallel.mismatch import Mismatch
from runtime.validation.exercise import Unexercised, allow

__all__ = ["PARTS", "CheckResult", "PartFailure", "PartSkip", "ResultBuilder", "ValidationResult", "Verdict"]

Verdict = Literal["proven", "not fully proven", "not proven"]


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
class PartSkip:
    """The reason why there was nothing to compare in a part."""

    reason: str


@dataclass(frozen=True)
class PartFailure:
    """The reason why the parallel model did not run: its class or the runtime failed, and says nothing about bytes."""

    reason: str


@dataclass(frozen=True)
class ValidationResult:
    """The result of a validation.

    Args:
        world_size: the number of ranks.
        checks: the results by part.
        skipped: the reasons why other parts were skipped, by part.
        failed: the reasons why the parallel model did not run, by part.
        unexercised: what no check reached, allowed or not.
        device: the kind of device that ranks computed on.
        seconds: the time that each phase took on rank 0.
        ranks: what the ranks were, `processes` or `threads`.
        by_block: whether the models were compared block by block.
    """

    world_size: int
    checks: Mapping[str, CheckResult]
    skipped: Mapping[str, str] = field(default_factory=dict)
    failed: Mapping[str, str] = field(default_factory=dict)
    unexercised: tuple[Unexercised, ...] = ()
    device: str = "cpu"
    seconds: Mapping[str, float] = field(default_factory=dict)
    ranks: str = "processes"
    by_block: bool = False

    @property
    def verdict(self) -> Verdict:
        """What the validation shows: a proof, one with gaps, or none."""
        is_checked = all(part in self.checks for part in _ESSENTIAL)
        if not is_checked or self.failed or self.is_wrong:
            return "not proven"
        return "proven" if all(row.allowed for row in self.unexercised) else "not fully proven"

    @property
    def ok(self) -> bool:
        """Whether structure, content and forward were checked, no check failed, and what matters was exercised."""
        return self.verdict == "proven"

    @property
    def is_wrong(self) -> bool:
        """Whether a check found something wrong."""
        return not all(check.ok for check in self.checks.values())

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form, which has every part, checked or not."""
        parts = {part: self.checks[part].to_json() if part in self.checks else dict(_UNCHECKED) for part in PARTS}
        return {
            "ok": self.ok,
            "verdict": self.verdict,
            "world_size": self.world_size,
            "device": self.device,
            "ranks": self.ranks,
            "by_block": self.by_block,
            **parts,
            "skipped": dict(self.skipped),
            "failed": dict(self.failed),
            "unexercised": [row.to_json() for row in self.unexercised],
            "seconds": dict(self.seconds),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ValidationResult:
        """Read the JSON form that a worker wrote."""
        return cls(
            value["world_size"],
            {part: CheckResult.from_json(value[part]) for part in PARTS if value[part]["ok"] is not None},
            value["skipped"],
            value["failed"],
            tuple(map(Unexercised.from_json, value["unexercised"])),
            value["device"],
            value["seconds"],
            value["ranks"],
            value["by_block"],
        )


def _replace_non_finite(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True)
class ResultBuilder:
    """Collects the results of a validation as it runs.

    Args:
        device: the device that this rank computes on.
        checks: the results so far, by part.
        skipped: the reasons why parts were skipped, by part.
        failed: the reasons why the parallel model did not run, by part.
        unexercised: what no check reached.
        seconds: the time that each phase took on this rank.
    """

    device: torch.device
    checks: dict[str, CheckResult] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    unexercised: list[Unexercised] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def add(self, part: str, result: CheckResult | PartSkip | PartFailure) -> None:
        """Add the result of a part, or the reason why there is none."""
        if isinstance(result, PartSkip):
            self.skip(result.reason, part)
        elif isinstance(result, PartFailure):
            self.failed[part] = result.reason
        else:
            self.checks[part] = result

    def skip(self, reason: str, *parts: str) -> None:
        """Record why parts are skipped."""
        self.skipped.update(dict.fromkeys(parts, reason))

    def build(
        self, world_size: int, ranks: str, seconds: Mapping[str, float], allowed: Iterable[str], *, by_block: bool
    ) -> ValidationResult:
        """Return the result.

        Args:
            world_size: the number of ranks.
            ranks: what the ranks are, `processes` or `threads`.
            seconds: the time that each phase took on rank 0.
            allowed: the patterns of what need not be exercised.
            by_block: whether the models were compared block by block.
        """
        unexercised = allow(self.unexercised, tuple(allowed))
        return ValidationResult(
            world_size, self.checks, self.skipped, self.failed, unexercised, self.device.type, seconds, ranks, by_block
        )

    @contextmanager
    def time_phase(self, phase: str) -> Iterator[None]:
        """Add the time that the body takes to a phase, including pending work of the device."""
        began = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - began
