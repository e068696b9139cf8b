"""One JSON object for programs, of the same shape for `rewrite` and `check`; docs/workflow.md describes it."""

from __future__ import annotations

from dataclasses import asdict

from codemods.files.sources import format_path
from codemods.tree.outcome import Change, LocatedEdit, LocatedFinding, format_edit_message
from migrator.formats.report import SourceReport
from plans.decompose import SetStyle
from plans.rule import load_rule

__all__ = ["report_as_json"]


def report_as_json(report: SourceReport) -> dict[str, object]:
    """Return a report as JSON values."""
    return {
        "written": report.written,
        "files": report.files,
        "plan_files": report.plan_files,
        "dialect": asdict(report.dialects[0]) if len(report.dialects) == 1 else None,
        "dialects": [asdict(detected) for detected in report.dialects],
        "changes": [_change_as_json(change) for change in report.changes],
        "findings": [_finding_as_json(located) for located in report.findings],
        "errors": [error.to_json() for error in report.errors],
    }


def _change_as_json(change: Change) -> dict[str, object]:
    return {
        "path": format_path(change.path),
        "role": change.role,
        "edits": [_edit_as_json(edit) for edit in change.edits],
    }


def _edit_as_json(located: LocatedEdit) -> dict[str, object]:
    edit = located.edit
    return {
        "line": located.line,
        "class": located.class_name,
        "plan": located.attribute,
        "code": edit.code,
        "severity": load_rule(edit.code).severity,
        "key": edit.key,
        "before": edit.before if isinstance(edit, SetStyle) else None,
        "style": edit.style,
        "message": format_edit_message(edit),
    }


def _finding_as_json(located: LocatedFinding) -> dict[str, object]:
    return {
        "path": format_path(located.path),
        "line": located.line,
        "class": located.class_name,
        "plan": located.attribute,
        "code": located.finding.code,
        "severity": located.finding.severity,
        "key": located.finding.key,
        "message": located.finding.message,
        "hint": located.finding.hint,
    }
