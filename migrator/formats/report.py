"""What a format is given: the outcome of a run, all errors included, and whether files were written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from codemods.rewriting.write import WriteResult
from codemods.tree.detect import DetectedDialect
from codemods.tree.outcome import Change, LocatedFinding, Outcome, build_pending_findings
from plans.errors import MigratorError

__all__ = ["SourceReport", "build_pending_report", "build_written_report"]


@dataclass(frozen=True)
class SourceReport:
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
    findings: tuple[LocatedFinding, ...]
    errors: tuple[MigratorError, ...]
    files: int
    plan_files: int
    written: bool
    dialects: tuple[DetectedDialect, ...] = ()

    @property
    def pending(self) -> tuple[LocatedFinding, ...]:
        """The edits that wait to be made, each as a finding."""
        return () if self.written else tuple(build_pending_findings(self.changes))

    @property
    def all_findings(self) -> tuple[LocatedFinding, ...]:
        """Pending edits and findings, by file and line."""
        return tuple(sorted((*self.pending, *self.findings), key=_sort_key))

    @property
    def is_clean(self) -> bool:
        """Whether nothing is a warning or an error; notes are right as they are."""
        return all(found.finding.severity == "note" for found in self.all_findings)


def build_pending_report(outcome: Outcome) -> SourceReport:
    """Return the report of a run that writes nothing."""
    return _build_report(outcome, outcome.changes, outcome.errors, written=False)


def build_written_report(outcome: Outcome, result: WriteResult) -> SourceReport:
    """Return the report of a run whose changes were made, as far as they could be."""
    errors = (*outcome.errors, *result.errors)
    return _build_report(outcome, result.changes, errors, written=True)


def _build_report(
    outcome: Outcome,
    changes: tuple[Change, ...],
    errors: tuple[MigratorError, ...],
    *,
    written: bool,
) -> SourceReport:
    return SourceReport(changes, outcome.findings, errors, outcome.files, outcome.plan_files, written, outcome.dialects)


def _sort_key(located: LocatedFinding) -> tuple[Path, int]:
    return located.path, located.line
