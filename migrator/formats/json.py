"""For programs: one JSON object, the same shape for `rewrite` and `check`, described in docs/workflow.md."""

from __future__ import annotations

from dataclasses import asdict

from codemods.files.sources import shown
from codemods.tree.outcome import Change, Located, LocatedEdit
from codemods.tree.pending import edit_message
from migrator.formats.report import Report
from plans.decompose import SetStyle
from plans.rule import rule

__all__ = ["report_json"]


def report_json(report: Report) -> dict[str, object]:
    """Return a report as JSON values."""
    return {
        "written": report.written,
        "files": report.files,
        "plan_files": report.plan_files,
        "dialect": asdict(report.dialects[0]) if len(report.dialects) == 1 else None,
        "dialects": [asdict(found) for found in report.dialects],
        "changes": [_change(change) for change in report.changes],
        "findings": [_finding(found) for found in report.findings],
        "errors": [error.to_json() for error in report.errors],
    }


def _change(change: Change) -> dict[str, object]:
    return {"path": shown(change.path), "role": change.role, "edits": [_edit(edit) for edit in change.edits]}


def _edit(located: LocatedEdit) -> dict[str, object]:
    edit = located.edit
    return {
        "line": located.line,
        "class": located.class_name,
        "plan": located.attribute,
        "code": edit.code,
        "severity": rule(edit.code).severity,
        "key": edit.key,
        "before": edit.before if isinstance(edit, SetStyle) else None,
        "style": edit.style,
        "message": edit_message(edit),
    }


def _finding(found: Located) -> dict[str, object]:
    return {
        "path": shown(found.path),
        "line": found.line,
        "class": found.class_name,
        "plan": found.attribute,
        "code": found.finding.code,
        "severity": found.finding.severity,
        "key": found.finding.key,
        "message": found.finding.message,
        "hint": found.finding.hint,
    }
