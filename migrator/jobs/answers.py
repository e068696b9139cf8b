"""What a step is given beside its options, and what comes of its work."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from plans.errors import MigratorError

__all__ = ["ActionOutcome", "StepContext"]


@dataclass(frozen=True)
class StepContext:
    """What a step is given beside its options.

    Args:
        is_own_output: whether nothing is at the destination but what this job wrote there and nobody touched.
        progress: told bytes done, bytes in all and what is at hand.
        notify: told what a person should know.
    """

    is_own_output: bool
    progress: Callable[[int, int, str], None]
    notify: Callable[[str], None]


@dataclass(frozen=True)
class ActionOutcome:
    """What came of a step's work.

    Args:
        code: its exit code.
        summary: in one line.
        result: in JSON, as the command prints it.
        page: its report for a browser.
        patch: that would do what it did not.
        written_files: files of its own sources that it changed.
        error: why part of it could not be done.
    """

    code: int
    summary: str
    result: Mapping[str, object]
    page: str | None = None
    patch: bytes | None = None
    written_files: tuple[Path, ...] = ()
    error: MigratorError | None = None
