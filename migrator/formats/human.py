"""For people: one line for each file written and each finding, then a summary."""

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
    """Yield a line for each finding and one on the whole run."""
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
    """Yield a line for each pending edit and each finding, the next step after each kind, and a summary."""
    everything = report.all_findings
    for found in everything:
        yield _finding_line(found)
    if not report.plan_files:
        yield f"no plans found in {_count_files(report)}"
        return
    yield from () if report.is_clean else _dialect_lines(report)
    hints = {found.finding.code: found.finding.hint for found in everything if found.finding.severity != "note"}
    for code, hint in sorted(hints.items()):
        yield f"{code}: {hint}"
    severities = Counter(found.finding.severity for found in everything)
    kinds = [format_count(severities[name], name) for name in ("error", "warning", "note") if severities[name]]
    yield f"{', '.join(kinds) or 'nothing found'} in {_count_files(report)}"


def _dialect_lines(report: SourceReport) -> Iterator[str]:
    for found in report.dialects:
        yield f"read as {found.dialect}: {found.reason}"


def _choose_verb(report: SourceReport) -> str:
    return "rewrote" if report.written else "would rewrite"


def _finding_line(located: LocatedFinding) -> str:
    return f"{located.finding.severity} {format_path(located.path)}:{located.line} {located.finding.code} {located.finding.message}"


def _count_files(report: SourceReport) -> str:
    return format_count(report.files, "file")
