"""The result of `rewrite` or `check` that every output format is made from."""

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
        changes: the files that were written, or that would be.
        findings: the defects that no rewrite fixes.
        errors: the files and steps that failed.
        files: the number of files that were read.
        plan_files: the number of files that mention a plan.
        written: whether the changes were written.
        dialects: the dialect of each project, if it was detected.
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
        """The edits that are not written yet, each as a finding."""
        return () if self.written else tuple(build_pending_findings(self.changes))

    @property
    def all_findings(self) -> tuple[LocatedFinding, ...]:
        """Pending edits and findings, ordered by file and line."""
        return tuple(sorted((*self.pending, *self.findings), key=_sort_key))

    @property
    def is_clean(self) -> bool:
        """Whether there is no warning and no error; notes need no action."""
        return all(located.finding.severity == "note" for located in self.all_findings)


def build_pending_report(outcome: Outcome) -> SourceReport:
    """Return the report of a run that writes nothing."""
    return _build_report(outcome, outcome.changes, outcome.errors, written=False)


def build_written_report(outcome: Outcome, result: WriteResult) -> SourceReport:
    """Return the report of a run that wrote its changes, as far as that was possible."""
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
