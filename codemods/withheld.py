"""Edits withheld: those of entries that code removes again, or whose text would lose something."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from codemods.module import PlanLiteral, Removal, exclusive
from plans.decompose import Decomposition, Edit, SetStyle, decided_with
from plans.plan import wildcard
from plans.rule import Finding, rule

__all__ = ["withheld"]

_ANY = "*"


def withheld(literal: PlanLiteral, removals: Iterable[Removal], wanted: Decomposition) -> Decomposition:
    """Turn edits of a literal into findings where making them is not safe, whole experts modules at a time.

    Args:
        literal: what is to be edited.
        removals: what the class takes out of plans; nobody can say here which entries are still there after it.
        wanted: its edits.
    """
    removed = [one for one in removals if one.attribute == literal.attribute and not exclusive(one, literal)]
    lost = [
        edit
        for edit in wanted.edits
        if not _is_replaceable(literal, edit) or any(_removes(one, edit) for one in removed)
    ]
    if not lost:
        return wanted
    held = frozenset(decided_with(edit.key) for edit in lost)
    message = rule("MIG204").message
    keys = dict.fromkeys(edit.key if isinstance(edit, SetStyle) else edit.anchor for edit in lost)
    return replace(
        wanted,
        edits=tuple(edit for edit in wanted.edits if decided_with(edit.key) not in held),
        findings=(*wanted.findings, *(Finding("MIG204", key, message.format(key=key)) for key in keys)),
        disputed=wanted.disputed | held,
    )


def _is_replaceable(literal: PlanLiteral, edit: Edit) -> bool:
    if not isinstance(edit, SetStyle):
        return True
    return all(entry.replaceable for entry in literal.entries if (entry.key, entry.style) == (edit.key, edit.before))


def _removes(removal: Removal, edit: Edit) -> bool:
    key = removal.key
    return key in (None, _ANY) or (key is not None and decided_with(wildcard(key)) == decided_with(wildcard(edit.key)))
