"""What becomes of a family of plans: the param-level decomposition, or a translation into another dialect.

What becomes of a literal depends on the rest of its plan. Where code decides what that is, an edit is made only if
every alternative asks for it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

from codemods.files.sources import format_path
from codemods.inheritance.ownership import PlanLocation, Tree
from codemods.inheritance.relations import Consumer, find_consumers
from codemods.models.describe import describe
from codemods.models.layouts import find_layout
from codemods.reading.alternatives import Alternative, find_alternatives, keep_relevant_literals
from codemods.reading.module import ANY_KEY, ClassPlans, PlanLiteral, are_exclusive
from codemods.rewriting.families import Family, get_anchor
from plans.decompose import (
    Decomposition,
    Edit,
    InsertEntry,
    LayoutReader,
    SetStyle,
    decompose,
    find_group_key,
    is_decomposable_plan,
)
from plans.dialect import Dialect
from plans.model_facts import ExpertLayout, KeyTarget, TargetReader
from plans.plan import plan_kind, to_wildcard
from plans.rule import Finding, load_rule

__all__ = ["block_unsafe_edits", "find_siblings", "report_blocked", "to_dialect", "to_param_level"]


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


_NOTHING = Decomposition((), ())

_EXPERT_PARAMETER = re.compile(r"(?<!\w)experts\.(?:gate_up_proj|up_proj|down_proj)$")


def to_param_level(tree: Tree, family: Family) -> Mapping[PlanLocation, Decomposition]:
    """Decompose the expert entries of a family's plans, where every model that uses them has the regular layout."""
    layouts = _build_layout_reader(tree, family)
    own = {place.path.parent for place in family.locations}

    def read(experts: str) -> ExpertLayout | None:
        found = list(layouts(experts).values())
        return None if None in found else next((one for one in found if one and one.irregularity), found[0])

    def name_consumer(found: Finding) -> Finding:
        shows = layouts(find_group_key(found.key)) if found.code == "MIG203" else {}
        unclear = next((folder for (folder, _), layout in shows.items() if layout is None and folder not in own), None)
        return replace(found, message=f"{found.message} of {format_path(unclear)}, which uses it") if unclear else found

    results = {place: _decompose_plan(tree, place, read) for place in family.locations}
    return {
        place: replace(found, findings=tuple(map(name_consumer, found.findings))) for place, found in results.items()
    }


def to_dialect(source: Dialect, target: Dialect, tree: Tree, family: Family) -> Mapping[PlanLocation, Decomposition]:
    """Translate a family's plans by meaning; what a key names must be the same in every model that uses it."""
    describer = partial(
        _describe_for_all, frozenset((place.path.parent, place.class_name) for place in family.locations)
    )
    return {place: _translate_plan(source, target, tree, place, describer) for place in family.locations}


def _decompose_plan(tree: Tree, location: PlanLocation, read_layout: LayoutReader) -> Decomposition:
    literal = tree.plan(location)
    if not isinstance(literal, PlanLiteral):
        return _NOTHING
    agreed = _merge_alternatives(
        [
            _block_unwritable(literal, decompose(literal.plan, read_layout, one.plan), one)
            for one in find_siblings(tree, location)
        ]
    )
    return block_unsafe_edits(literal, tree.get_class(location), agreed)


def _translate_plan(
    source: Dialect, target: Dialect, tree: Tree, location: PlanLocation, describer: TargetReader
) -> Decomposition:
    from plans.translate import translate

    literal = tree.plan(location)
    kind = plan_kind(location.attribute)
    if not isinstance(literal, PlanLiteral) or kind is None:
        return _NOTHING
    computed = report_blocked([entry.key for entry in literal.entries if entry.style is None])
    others = find_alternatives(tree.get_class(location), literal)
    results = [translate({**one.plan, **literal.plan}, source, target, describer, kind) for one in others]
    return block_unsafe_edits(
        literal, None, _merge_alternatives([_restrict_to_literal(literal, result, computed) for result in results])
    )


def _restrict_to_literal(literal: PlanLiteral, wanted: Decomposition, more: Sequence[Finding]) -> Decomposition:
    """Keep of a whole plan's translation what speaks of one literal's entries."""
    edits = tuple(edit for edit in wanted.edits if edit.key in literal.plan)
    return Decomposition(edits, (*(found for found in wanted.findings if found.key in literal.plan), *more))


def _describe_for_all(consumers: frozenset[tuple[Path, str]], key: str) -> KeyTarget | None:
    """Return what a key names in every model that uses the plan, None where two of them differ."""
    found = {describe(folder, key, owner.rpartition(".")[2]) for folder, owner in consumers}
    kinds = {(one.kind, one.ndim) if one else None for one in found}
    return next(iter(found)) if len(kinds) == 1 else None


def find_siblings(tree: Tree, location: PlanLocation) -> tuple[Alternative, ...]:
    """Return what the plan of a literal can hold beside it; of TP and SP plans what bears on the same experts."""
    literal, owner = tree.literal(location), tree.get_class(location)
    return find_alternatives(
        keep_relevant_literals(owner, literal) if is_decomposable_plan(location.attribute) else owner, literal
    )


def _merge_alternatives(results: Sequence[Decomposition]) -> Decomposition:
    """Return what every alternative asks for; what only some of them ask for is disputed."""
    wanted = [frozenset(result.edits) for result in results]
    contested = [edit for result in results for edit in result.edits if not all(edit in edits for edits in wanted)]
    disputed = frozenset(find_group_key(edit.key) for edit in contested)
    findings = dict.fromkeys(found for result in results for found in result.findings)
    explained = {find_group_key(found.key) for found in findings}
    unexplained = [get_anchor(edit) for edit in contested if find_group_key(edit.key) not in explained]
    return Decomposition(
        tuple(edit for edit in results[0].edits if find_group_key(edit.key) not in disputed),
        (*findings, *report_blocked(unexplained)),
        disputed.union(*(result.ambiguous for result in results)),
    )


def _block_unwritable(literal: PlanLiteral, wanted: Decomposition, other: Alternative) -> Decomposition:
    """Turn what cannot be written safely into findings.

    That is: experts with a computed style, or with an entry that is written twice, new entries without a place for
    them, and whatever depends on entries that the plan takes in from elsewhere and that nobody here can see.
    """
    takes_in = literal.is_partial or other.is_partial
    here = [entry.key for entry in literal.entries if entry.style is None and _EXPERT_PARAMETER.search(entry.key)]
    computed = {find_group_key(key) for key in (*here, *filter(_EXPERT_PARAMETER.search, other.computed))}
    fixed = {entry.key for entry in literal.entries if takes_in or not entry.can_precede}
    unseen = [found.key for found in wanted.findings if takes_in and found.code == "MIG202"]
    twice = _find_duplicates(literal, other)
    lost = [
        edit
        for edit in wanted.edits
        if find_group_key(edit.key) in computed or (isinstance(edit, InsertEntry) and edit.anchor in fixed)
    ]
    overridden = [edit for edit in wanted.edits if edit not in lost and find_group_key(edit.key) in twice]
    whys = {get_anchor(edit): f"line {twice[find_group_key(edit.key)]} writes it too" for edit in overridden}
    findings = [found for found in wanted.findings if found.key not in unseen]
    return Decomposition(
        tuple(edit for edit in wanted.edits if edit not in (*lost, *overridden)),
        (*findings, *report_blocked([*here, *map(get_anchor, lost), *unseen]), *report_blocked(whys)),
        frozenset(find_group_key(edit.key) for edit in (*lost, *overridden)),
    )


def _find_duplicates(literal: PlanLiteral, other: Alternative) -> Mapping[str, int]:
    """Return the experts modules of which an entry is written elsewhere too, with the line; the later one counts."""
    keys = {entry.key for entry in literal.entries}
    return {find_group_key(key): line for key, line in other.lines.items() if key in keys}


def _build_layout_reader(tree: Tree, family: Family) -> Callable[[str], Mapping[Consumer, ExpertLayout | None]]:
    """Return a reader that lets every model speak that uses a plan, from the key of an experts module."""

    @cache
    def read(experts: str) -> Mapping[Consumer, ExpertLayout | None]:
        return {
            (folder, owner): find_layout(folder, describe(folder, experts, owner.rpartition(".")[2]))
            for folder, owner in find_consumers(tree, family.locations)
        }

    return read
