"""Edits withheld: those of entries that other statements remove, share or change, and those that would lose text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from codemods.reading.module import ANY_KEY, ClassPlans, PlanLiteral, are_exclusive
from codemods.rewriting.decisions import get_anchor
from plans.decompose import Decomposition, Edit, SetStyle, find_group_key
from plans.plan import to_wildcard
from plans.rule import Finding, load_rule

__all__ = ["block_unsafe_edits", "report_blocked"]

_UNSAFE = "the code that builds it cannot be rewritten safely"


def block_unsafe_edits(literal: PlanLiteral, owner: ClassPlans | None, wanted: Decomposition) -> Decomposition:
    """Turn edits of a literal into findings where making them is not safe, whole experts modules at a time.

    Args:
        literal: what is to be edited.
        owner: its class, None where what other statements do does not matter.
        wanted: its edits.
    """
    lost = {edit: why for edit in wanted.edits if (why := next(_find_block_reasons(literal, owner, edit), None))}
    if not lost:
        return wanted
    held = frozenset(find_group_key(edit.key) for edit in lost)
    return replace(
        wanted,
        edits=tuple(edit for edit in wanted.edits if find_group_key(edit.key) not in held),
        findings=(*wanted.findings, *report_blocked({get_anchor(edit): why for edit, why in lost.items()})),
        ambiguous=wanted.ambiguous | held,
    )


def report_blocked(reasons: Mapping[str, str] | Iterable[str]) -> tuple[Finding, ...]:
    """Return a finding for each entry that needs an edit which cannot be made.

    Args:
        reasons: the keys, each with what keeps it as it is; keys alone where that is how their text is built.
    """
    known = reasons if isinstance(reasons, Mapping) else dict.fromkeys(reasons, _UNSAFE)
    message = load_rule("MIG204").message
    return tuple(Finding("MIG204", key, message.format(key=key, where=why)) for key, why in known.items())


def _find_block_reasons(literal: PlanLiteral, owner: ClassPlans | None, edit: Edit) -> Iterator[str]:
    """Yield what keeps an edit from being made."""
    if not _is_replaceable(literal, edit):
        yield _UNSAFE
    module = find_group_key(to_wildcard(edit.key))
    for hold in owner.conflicts if owner else ():
        if hold.attribute == literal.attribute and (hold.module is None or to_wildcard(hold.module) == module):
            yield hold.reason
    for one in owner.removals if owner else ():
        # A plan that is taken away whole is not half migrated.
        removed = one.key is not None and (one.key == ANY_KEY or find_group_key(to_wildcard(one.key)) == module)
        if removed and one.attribute == literal.attribute and not are_exclusive(one, literal):
            yield f"line {one.line} takes entries out of it again"


def _is_replaceable(literal: PlanLiteral, edit: Edit) -> bool:
    if not isinstance(edit, SetStyle):
        return True
    return all(entry.replaceable for entry in literal.entries if (entry.key, entry.style) == (edit.key, edit.before))
