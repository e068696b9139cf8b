"""What a validation has found so far, and how long each phase took."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from runtime.validation.values import CheckResult

__all__ = ["ResultBuilder"]


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
