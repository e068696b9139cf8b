"""What `check` adds to a rewrite's outcome: pending edits as findings, and ignore comments of no use."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from codemods.tree.outcome import Change, Located, LocatedEdit
from codemods.tree.selection import Silencer
from plans.decompose import Edit, SetStyle
from plans.rule import Finding, rule

__all__ = ["edit_message", "pending_findings", "unused_comments"]


def pending_findings(changes: Iterable[Change]) -> Iterator[Located]:
    """Yield a finding for every edit, in the file that it is pending in."""
    for change in changes:
        for located in change.edits:
            yield _pending(change, located)


def unused_comments(silencer: Silencer) -> Iterator[Located]:
    """Yield a finding for every ignore comment of no use, once every other finding was asked for."""
    for path, line, finding in silencer.unused():
        yield Located(path, line, "", "", finding)


def edit_message(edit: Edit) -> str:
    """Return the rule's message about an edit."""
    style = edit.before if isinstance(edit, SetStyle) else edit.style
    return rule(edit.code).message.format(key=edit.key, style=style, to=edit.style, where="")


def _pending(change: Change, located: LocatedEdit) -> Located:
    finding = Finding(located.edit.code, located.edit.key, edit_message(located.edit))
    return Located(change.path, located.line, located.class_name, located.attribute, finding)
