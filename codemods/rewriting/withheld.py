"""Edits withheld: those of entries that other statements remove, share or change, and those that would lose text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from codemods.reading.module import ANY_KEY, ClassPlans, PlanLiteral, exclusive
from codemods.rewriting.decisions import anchor_of
from plans.decompose import Decomposition, Edit, SetStyle, decided_with
from plans.plan import wildcard
from plans.rule import Finding, rule

__all__ = ["not_writable", "withheld"]

_UNSAFE = "the code that builds it cannot be rewritten safely"


def withheld(literal: PlanLiteral, owner: ClassPlans | None, wanted: Decomposition) -> Decomposition:
    """Turn edits of a literal into findings where making them is not safe, whole experts modules at a time.

    Args:
        literal: what is to be edited.
        owner: its class, None where what other statements do does not matter.
        wanted: its edits.
    """
    lost = {edit: why for edit in wanted.edits if (why := next(_reasons(literal, owner, edit), None))}
    if not lost:
        return wanted
    held = frozenset(decided_with(edit.key) for edit in lost)
    return replace(
        wanted,
        edits=tuple(edit for edit in wanted.edits if decided_with(edit.key) not in held),
        findings=(*wanted.findings, *not_writable({anchor_of(edit): why for edit, why in lost.items()})),
        disputed=wanted.disputed | held,
    )


def not_writable(reasons: Mapping[str, str] | Iterable[str]) -> tuple[Finding, ...]:
    """Return a finding for each entry that needs an edit which cannot be made.

    Args:
        reasons: the keys, each with what keeps it as it is; keys alone where that is how their text is built.
    """
    known = reasons if isinstance(reasons, Mapping) else dict.fromkeys(reasons, _UNSAFE)
    message = rule("MIG204").message
    return tuple(Finding("MIG204", key, message.format(key=key, where=why)) for key, why in known.items())


def _reasons(literal: PlanLiteral, owner: ClassPlans | None, edit: Edit) -> Iterator[str]:
    """Yield what keeps an edit from being made."""
    if not _is_replaceable(literal, edit):
        yield _UNSAFE
    module = decided_with(wildcard(edit.key))
    for hold in owner.holds if owner else ():
        if hold.attribute == literal.attribute and (hold.module is None or wildcard(hold.module) == module):
            yield hold.why
    for one in owner.removals if owner else ():
        # A plan that is taken away whole is not half migrated.
        removed = one.key is not None and (one.key == ANY_KEY or decided_with(wildcard(one.key)) == module)
        if removed and one.attribute == literal.attribute and not exclusive(one, literal):
            yield f"line {one.line} takes entries out of it again"


def _is_replaceable(literal: PlanLiteral, edit: Edit) -> bool:
    if not isinstance(edit, SetStyle):
        return True
    return all(entry.replaceable for entry in literal.entries if (entry.key, entry.style) == (edit.key, edit.before))
