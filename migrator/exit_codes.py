"""Exit codes, the same for every command.

- 0, `CLEAN`: nothing was found, and all work was done.
- 1, `FOUND`: a difference or a defect was found: pending edits, a finding, an unexplained change, content that does not
  match, a plan that ran and computes something else or that a check refuses on its model, or something that a proof
  claims and that was not exercised.
- 2, `FAILED`: nothing can be said: the request, the tree, a checkpoint, a model class or the runtime failed, or the
  mesh that was asked for does not fit.

Where both occur, the code is 2, and the output has both.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum
from typing import TYPE_CHECKING

from plans.errors import MigratorError, MismatchError

if TYPE_CHECKING:
    from runtime.validation.results import ValidationResult

__all__ = ["ExitCode", "combine", "of_findings", "of_validation"]


class ExitCode(IntEnum):
    """How a command ended."""

    CLEAN = 0
    FOUND = 1
    FAILED = 2


def of_findings(found: object, errors: Iterable[MigratorError] = ()) -> ExitCode:
    """Return the code of work that found something or nothing.

    Args:
        found: what was found; anything false is nothing.
        errors: what failed. A mismatch is a difference, not a failure.
    """
    failures = list(errors)
    if any(not isinstance(error, MismatchError) for error in failures):
        return ExitCode.FAILED
    return ExitCode.FOUND if found or failures else ExitCode.CLEAN


def of_validation(result: ValidationResult) -> ExitCode:
    """Return the code of a validation, a failure of the runtime being none of the checkpoint's."""
    if result.failed:
        return ExitCode.FAILED
    return of_findings(not result.ok)


def combine(codes: Iterable[int]) -> ExitCode:
    """Return the code of several pieces of work, which is the highest of theirs."""
    return ExitCode(max(codes, default=ExitCode.CLEAN))
