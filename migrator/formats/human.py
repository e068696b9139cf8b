"""Lines for people: one for each changed file and each finding, then a summary."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from codemods.files.sources import format_path
from codemods.tree.outcome import LocatedFinding
from migrator.formats.report import SourceReport
from plans.text import format_count

__all__ = ["check_lines", "rewrite_lines", "rewrite_summary"]


def rewrite_lines(report: SourceReport) -> Iterator[str]:
    """Yield a line for each changed file."""
    verb = _choose_verb(report)
    for change in report.changes:
        yield f"{verb} {format_path(change.path)}  {format_count(len(change.edits), 'entry', 'entries')}  {change.role}"


def rewrite_summary(report: SourceReport) -> Iterator[str]:
    """Yield a line for each finding, and a summary of the run."""
    yield from map(_finding_line, report.findings)
    yield from _dialect_lines(report)
    if not report.plan_files:
        yield f"no plans found in {_count_files(report)}"
    elif not report.changes:
        yield f"nothing {'rewritten' if report.written and report.errors else 'to rewrite'} in {_count_files(report)}"
    else:
        roles = Counter(change.role for change in report.changes)
        entries = sum(len(change.edits) for change in report.changes)
        files = format_count(len(report.changes), "file")
        yield (
            f"{_choose_verb(report)} {format_count(entries, 'entry', 'entries')} in {files}: "
            f"{format_count(roles['owner'], 'owner')}, "
            f"{format_count(roles['copy'], 'generated copy', 'generated copies')}"
        )


def check_lines(report: SourceReport) -> Iterator[str]:
    """Yield a line for each pending edit and each finding, the next step for each rule, and a summary."""
    findings = report.all_findings
    for located in findings:
        yield _finding_line(located)
    if not report.plan_files:
        yield f"no plans found in {_count_files(report)}"
        return
    yield from _dialect_lines(report, notes_only=report.is_clean)
    hints = {located.finding.code: located.finding.hint for located in findings if located.finding.severity != "note"}
    for code, hint in sorted(hints.items()):
        yield f"{code}: {hint}"
    severities = Counter(located.finding.severity for located in findings)
    kinds = [format_count(severities[name], name) for name in ("error", "warning", "note") if severities[name]]
    yield f"{', '.join(kinds) or 'nothing found'} in {_count_files(report)}"


def _dialect_lines(report: SourceReport, *, notes_only: bool = False) -> Iterator[str]:
    for detected in report.dialects:
        if detected.is_noteworthy or not notes_only:
            yield f"read as {detected.dialect}: {detected.reason}"


def _choose_verb(report: SourceReport) -> str:
    return "rewrote" if report.written else "would rewrite"


def _finding_line(located: LocatedFinding) -> str:
    finding = located.finding
    return f"{finding.severity} {format_path(located.path)}:{located.line} {finding.code} {finding.message}"


def _count_files(report: SourceReport) -> str:
    return format_count(report.files, "file")
