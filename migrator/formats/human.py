"""For people: one line for each file written and each finding, then a summary."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from codemods.files.sources import shown
from codemods.tree.outcome import Located
from migrator.formats.counts import counted
from migrator.formats.report import Report

__all__ = ["check_lines", "rewrite_lines", "rewrite_summary"]


def rewrite_lines(report: Report) -> Iterator[str]:
    """Yield a line for each changed file."""
    verb = _verb(report)
    for change in report.changes:
        yield f"{verb} {shown(change.path)}  {counted(len(change.edits), 'entry', 'entries')}  {change.role}"


def rewrite_summary(report: Report) -> Iterator[str]:
    """Yield a line for each finding and one on the whole run."""
    yield from map(_finding_line, report.findings)
    yield from _dialect_lines(report)
    if not report.plan_files:
        yield f"no plans found in {_files(report)}"
    elif not report.changes:
        yield f"nothing {'rewritten' if report.written and report.errors else 'to rewrite'} in {_files(report)}"
    else:
        roles = Counter(change.role for change in report.changes)
        entries = sum(len(change.edits) for change in report.changes)
        files = counted(len(report.changes), "file")
        yield (
            f"{_verb(report)} {counted(entries, 'entry', 'entries')} in {files}: "
            f"{counted(roles['owner'], 'owner')}, "
            f"{counted(roles['copy'], 'generated copy', 'generated copies')}"
        )


def check_lines(report: Report) -> Iterator[str]:
    """Yield a line for each pending edit and each finding, the next step after each kind, and a summary."""
    everything = report.everything
    for found in everything:
        yield _finding_line(found)
    if not report.plan_files:
        yield f"no plans found in {_files(report)}"
        return
    yield from () if report.is_clean else _dialect_lines(report)
    hints = {found.finding.code: found.finding.hint for found in everything if found.finding.severity != "note"}
    for code, hint in sorted(hints.items()):
        yield f"{code}: {hint}"
    severities = Counter(found.finding.severity for found in everything)
    kinds = [counted(severities[name], name) for name in ("error", "warning", "note") if severities[name]]
    yield f"{', '.join(kinds) or 'nothing found'} in {_files(report)}"


def _dialect_lines(report: Report) -> Iterator[str]:
    for found in report.dialects:
        yield f"read as {found.dialect}: {found.reason}"


def _verb(report: Report) -> str:
    return "rewrote" if report.written else "would rewrite"


def _finding_line(found: Located) -> str:
    return f"{found.finding.severity} {shown(found.path)}:{found.line} {found.finding.code} {found.finding.message}"


def _files(report: Report) -> str:
    return counted(report.files, "file")
