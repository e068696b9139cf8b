"""What `check` adds to a rewrite's outcome: pending edits as findings, and ignore comments of no use."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from codemods.tree.outcome import Change, LocatedEdit, LocatedFinding
from codemods.tree.selection import Suppressions
from plans.decompose import Edit, SetStyle
from plans.rule import Finding, load_rule

__all__ = ["build_pending_findings", "find_unused_comments", "format_edit_message"]


def build_pending_findings(changes: Iterable[Change]) -> Iterator[LocatedFinding]:
    """Yield a finding for every edit, in the file that it is pending in."""
    for change in changes:
        for located in change.edits:
            yield _build_pending_finding(change, located)


def find_unused_comments(suppressions: Suppressions) -> Iterator[LocatedFinding]:
    """Yield a finding for every ignore comment of no use, once every other finding was asked for."""
    for path, line, finding in suppressions.find_unused():
        yield LocatedFinding(path, line, "", "", finding)


def format_edit_message(edit: Edit) -> str:
    """Return the rule's message about an edit."""
    style = edit.before if isinstance(edit, SetStyle) else edit.style
    return load_rule(edit.code).message.format(key=edit.key, style=style, to=edit.style, where="")


def _build_pending_finding(change: Change, located: LocatedEdit) -> LocatedFinding:
    finding = Finding(located.edit.code, located.edit.key, format_edit_message(located.edit))
    return LocatedFinding(change.path, located.line, located.class_name, located.attribute, finding)
