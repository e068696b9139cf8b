"""What a format is given: the outcome of a run, all errors included, and whether files were written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from codemods.rewriting.write import Written
from codemods.tree.detect import Detected
from codemods.tree.outcome import Change, Located, Outcome
from codemods.tree.pending import pending_findings
from plans.errors import MigratorError

__all__ = ["Report", "pending_report", "written_report"]


@dataclass(frozen=True)
class Report:
    """The result of `rewrite` or `check`.

    Args:
        changes: files written, or to be written.
        findings: what no rewrite mends.
        errors: what could not be done.
        files: how many files were looked at.
        plan_files: how many of them mention a plan.
        written: whether the changes were made.
        dialects: what the tree speaks, where that was asked; of several projects what each of them does.
    """

    changes: tuple[Change, ...]
    findings: tuple[Located, ...]
    errors: tuple[MigratorError, ...]
    files: int
    plan_files: int
    written: bool
    dialects: tuple[Detected, ...] = ()

    @property
    def pending(self) -> tuple[Located, ...]:
        """The edits that wait to be made, each as a finding."""
        return () if self.written else tuple(pending_findings(self.changes))

    @property
    def everything(self) -> tuple[Located, ...]:
        """Pending edits and findings, by file and line."""
        return tuple(sorted((*self.pending, *self.findings), key=_place))

    @property
    def is_clean(self) -> bool:
        """Whether nothing is a warning or an error; notes are right as they are."""
        return all(found.finding.severity == "note" for found in self.everything)


def pending_report(outcome: Outcome) -> Report:
    """Return the report of a run that writes nothing."""
    return _report(outcome, outcome.changes, outcome.errors, written=False)


def written_report(outcome: Outcome, result: Written) -> Report:
    """Return the report of a run whose changes were made, as far as they could be."""
    errors = (*outcome.errors, *result.errors)
    return _report(outcome, result.changes, errors, written=True)


def _report(
    outcome: Outcome,
    changes: tuple[Change, ...],
    errors: tuple[MigratorError, ...],
    *,
    written: bool,
) -> Report:
    return Report(changes, outcome.findings, errors, outcome.files, outcome.plan_files, written, outcome.dialects)


def _place(found: Located) -> tuple[Path, int]:
    return found.path, found.line
