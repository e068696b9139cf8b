"""What becomes of a family of plans: the param-level decomposition, or a translation into another dialect.

What becomes of a literal depends on the rest of its plan. Where code decides what that is, an edit is made only if
every alternative asks for it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

from codemods.files.sources import shown
from codemods.inheritance.ownership import Place, Tree
from codemods.inheritance.users import User, users
from codemods.models.describe import describe
from codemods.models.layouts import layout_of
from codemods.reading.alternatives import Alternative, alternatives, related
from codemods.reading.module import PlanLiteral
from codemods.rewriting.decisions import anchor_of
from codemods.rewriting.propagate import Family
from codemods.rewriting.withheld import not_writable, withheld
from plans.decompose import Decomposition, InsertEntry, LayoutReader, decided_with, decompose, is_decomposed_plan
from plans.described import Described, Describer
from plans.dialect import Dialect
from plans.layout import ExpertLayout
from plans.plan import plan_kind
from plans.rule import Finding

__all__ = ["beside", "to_dialect", "to_param_level"]

_NOTHING = Decomposition((), ())

_EXPERT_PARAMETER = re.compile(r"(?<!\w)experts\.(?:gate_up_proj|up_proj|down_proj)$")


def to_param_level(tree: Tree, family: Family) -> Mapping[Place, Decomposition]:
    """Decompose the expert entries of a family's plans, where every model that uses them has the regular layout."""
    layouts = _layouts_of_users(tree, family)
    own = {place.path.parent for place in family.places}

    def read(experts: str) -> ExpertLayout | None:
        found = list(layouts(experts).values())
        return None if None in found else next((one for one in found if one and one.irregularity), found[0])

    def named(found: Finding) -> Finding:
        shows = layouts(decided_with(found.key)) if found.code == "MIG203" else {}
        unclear = next((folder for (folder, _), layout in shows.items() if layout is None and folder not in own), None)
        return replace(found, message=f"{found.message} of {shown(unclear)}, which uses it") if unclear else found

    results = {place: _decomposed(tree, place, read) for place in family.places}
    return {place: replace(found, findings=tuple(map(named, found.findings))) for place, found in results.items()}


def to_dialect(source: Dialect, target: Dialect, tree: Tree, family: Family) -> Mapping[Place, Decomposition]:
    """Translate a family's plans by meaning; what a key names must be the same in every model that uses it."""
    describer = partial(_described, frozenset((place.path.parent, place.class_name) for place in family.places))
    return {place: _translated(source, target, tree, place, describer) for place in family.places}


def _decomposed(tree: Tree, place: Place, layout_of: LayoutReader) -> Decomposition:
    literal = tree.plan(place)
    if not isinstance(literal, PlanLiteral):
        return _NOTHING
    agreed = _agreed(
        [_writable(literal, decompose(literal.plan, layout_of, one.plan), one) for one in beside(tree, place)]
    )
    return withheld(literal, tree.class_of(place), agreed)


def _translated(source: Dialect, target: Dialect, tree: Tree, place: Place, describer: Describer) -> Decomposition:
    from plans.translate import translate

    literal = tree.plan(place)
    kind = plan_kind(place.attribute)
    if not isinstance(literal, PlanLiteral) or kind is None:
        return _NOTHING
    computed = not_writable([entry.key for entry in literal.entries if entry.style is None])
    others = alternatives(tree.class_of(place), literal)
    results = [translate({**one.plan, **literal.plan}, source, target, describer, kind) for one in others]
    return withheld(literal, None, _agreed([_of_literal(literal, result, computed) for result in results]))


def _of_literal(literal: PlanLiteral, wanted: Decomposition, more: Sequence[Finding]) -> Decomposition:
    """Keep of a whole plan's translation what speaks of one literal's entries."""
    edits = tuple(edit for edit in wanted.edits if edit.key in literal.plan)
    return Decomposition(edits, (*(found for found in wanted.findings if found.key in literal.plan), *more))


def _described(users: frozenset[tuple[Path, str]], key: str) -> Described | None:
    """Return what a key names in every model that uses the plan, None where two of them differ."""
    found = {describe(folder, key, owner.rpartition(".")[2]) for folder, owner in users}
    kinds = {(one.named, one.rank) if one else None for one in found}
    return next(iter(found)) if len(kinds) == 1 else None


def beside(tree: Tree, place: Place) -> tuple[Alternative, ...]:
    """Return what the plan of a literal can hold beside it; of TP and SP plans what bears on the same experts."""
    literal, owner = tree.literal(place), tree.class_of(place)
    return alternatives(related(owner, literal) if is_decomposed_plan(place.attribute) else owner, literal)


def _agreed(results: Sequence[Decomposition]) -> Decomposition:
    """Return what every alternative asks for; what only some of them ask for is disputed."""
    wanted = [frozenset(result.edits) for result in results]
    contested = [edit for result in results for edit in result.edits if not all(edit in edits for edits in wanted)]
    disputed = frozenset(decided_with(edit.key) for edit in contested)
    findings = dict.fromkeys(found for result in results for found in result.findings)
    explained = {decided_with(found.key) for found in findings}
    unexplained = [anchor_of(edit) for edit in contested if decided_with(edit.key) not in explained]
    return Decomposition(
        tuple(edit for edit in results[0].edits if decided_with(edit.key) not in disputed),
        (*findings, *not_writable(unexplained)),
        disputed.union(*(result.disputed for result in results)),
    )


def _writable(literal: PlanLiteral, wanted: Decomposition, other: Alternative) -> Decomposition:
    """Turn what cannot be written safely into findings.

    That is: experts with a computed style, or with an entry that is written twice, new entries without a place for
    them, and whatever depends on entries that the plan takes in from elsewhere and that nobody here can see.
    """
    takes_in = literal.takes_in or other.takes_in
    here = [entry.key for entry in literal.entries if entry.style is None and _EXPERT_PARAMETER.search(entry.key)]
    computed = {decided_with(key) for key in (*here, *filter(_EXPERT_PARAMETER.search, other.computed))}
    fixed = {entry.key for entry in literal.entries if takes_in or not entry.can_precede}
    unseen = [found.key for found in wanted.findings if takes_in and found.code == "MIG202"]
    twice = _written_twice(literal, other)
    lost = [
        edit
        for edit in wanted.edits
        if decided_with(edit.key) in computed or (isinstance(edit, InsertEntry) and edit.anchor in fixed)
    ]
    overridden = [edit for edit in wanted.edits if edit not in lost and decided_with(edit.key) in twice]
    whys = {anchor_of(edit): f"line {twice[decided_with(edit.key)]} writes it too" for edit in overridden}
    findings = [found for found in wanted.findings if found.key not in unseen]
    return Decomposition(
        tuple(edit for edit in wanted.edits if edit not in (*lost, *overridden)),
        (*findings, *not_writable([*here, *map(anchor_of, lost), *unseen]), *not_writable(whys)),
        frozenset(decided_with(edit.key) for edit in (*lost, *overridden)),
    )


def _written_twice(literal: PlanLiteral, other: Alternative) -> Mapping[str, int]:
    """Return the experts modules of which an entry is written elsewhere too, with the line; the later one counts."""
    keys = {entry.key for entry in literal.entries}
    return {decided_with(key): line for key, line in other.lines.items() if key in keys}


def _layouts_of_users(tree: Tree, family: Family) -> Callable[[str], Mapping[User, ExpertLayout | None]]:
    """Return a reader that lets every model speak that uses a plan, from the key of an experts module."""

    @cache
    def read(experts: str) -> Mapping[User, ExpertLayout | None]:
        return {
            (folder, owner): layout_of(folder, describe(folder, experts, owner.rpartition(".")[2]))
            for folder, owner in users(tree, family.places)
        }

    return read
