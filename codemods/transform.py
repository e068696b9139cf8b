"""What becomes of a family of plans: the param-level decomposition, or a translation into another dialect.

What becomes of a literal depends on the rest of its plan. Where code decides what that is, an edit is made only if
every alternative asks for it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path

from codemods.alternatives import Alternative, alternatives
from codemods.describe import describe
from codemods.layouts import layout_of
from codemods.module import PlanLiteral
from codemods.ownership import Place, Tree
from codemods.propagate import Family
from codemods.withheld import withheld
from plans.decompose import Decomposition, Edit, InsertEntry, LayoutReader, decided_with, decompose
from plans.described import Described, Describer
from plans.dialect import Dialect
from plans.layout import ExpertLayout
from plans.plan import plan_kind
from plans.rule import Finding, rule

__all__ = ["beside", "to_dialect", "to_param_level"]

_NOTHING = Decomposition((), ())

_EXPERT_PARAMETER = re.compile(r"experts\.(?:gate_up_proj|up_proj|down_proj)$")


def to_param_level(tree: Tree, family: Family) -> Mapping[Place, Decomposition]:
    """Decompose the expert entries of a family's plans, where every model that uses them has the regular layout."""
    read = _layout_reader([(place.path.parent, place.class_name) for place in family.places])
    return {place: _decomposed(tree, place, read) for place in family.places}


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
    return withheld(literal, tree.module(place.path).classes[place.class_name].removals, agreed)


def _translated(source: Dialect, target: Dialect, tree: Tree, place: Place, describer: Describer) -> Decomposition:
    from plans.translate import translate

    literal = tree.plan(place)
    kind = plan_kind(place.attribute)
    if not isinstance(literal, PlanLiteral) or kind is None:
        return _NOTHING
    computed = _not_writable([entry.key for entry in literal.entries if entry.style is None])
    results = [translate({**one.plan, **literal.plan}, source, target, describer, kind) for one in beside(tree, place)]
    return withheld(literal, (), _agreed([_of_literal(literal, result, computed) for result in results]))


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
    """Return what the plan of a literal can hold beside it."""
    literal = tree.plan(place)
    assert isinstance(literal, PlanLiteral)
    return alternatives(tree.module(place.path).classes[place.class_name], literal)


def _agreed(results: Sequence[Decomposition]) -> Decomposition:
    """Return what every alternative asks for; what only some of them ask for is disputed."""
    wanted = [frozenset(result.edits) for result in results]
    contested = [edit for result in results for edit in result.edits if not all(edit in edits for edits in wanted)]
    disputed = frozenset(decided_with(edit.key) for edit in contested)
    findings = dict.fromkeys(found for result in results for found in result.findings)
    explained = {decided_with(found.key) for found in findings}
    unexplained = [_anchor(edit) for edit in contested if decided_with(edit.key) not in explained]
    return Decomposition(
        tuple(edit for edit in results[0].edits if decided_with(edit.key) not in disputed),
        (*findings, *_not_writable(unexplained)),
        disputed.union(*(result.disputed for result in results)),
    )


def _writable(literal: PlanLiteral, wanted: Decomposition, other: Alternative) -> Decomposition:
    """Turn what cannot be written safely into findings.

    That is: experts with a computed style, new entries without a place for them, and whatever depends on entries that
    the plan takes in from elsewhere and that nobody here can see.
    """
    takes_in = literal.takes_in or other.takes_in
    here = [entry.key for entry in literal.entries if entry.style is None and _EXPERT_PARAMETER.search(entry.key)]
    computed = {decided_with(key) for key in (*here, *filter(_EXPERT_PARAMETER.search, other.computed))}
    fixed = {entry.key for entry in literal.entries if takes_in or not entry.can_precede}
    unseen = [found.key for found in wanted.findings if takes_in and found.code == "MIG202"]
    lost = [
        edit
        for edit in wanted.edits
        if decided_with(edit.key) in computed or (isinstance(edit, InsertEntry) and edit.anchor in fixed)
    ]
    findings = [found for found in wanted.findings if found.key not in unseen]
    return Decomposition(
        tuple(edit for edit in wanted.edits if edit not in lost),
        (*findings, *_not_writable([*here, *map(_anchor, lost), *unseen])),
        frozenset(decided_with(edit.key) for edit in lost),
    )


def _anchor(edit: Edit) -> str:
    return edit.anchor if isinstance(edit, InsertEntry) else edit.key


def _not_writable(keys: Sequence[str]) -> list[Finding]:
    message = rule("MIG204").message
    return [Finding("MIG204", key, message.format(key=key)) for key in dict.fromkeys(keys)]


def _layout_reader(users: Sequence[tuple[Path, str]]) -> LayoutReader:
    """Return a reader that lets every model speak that uses the plan: the first irregular layout decides.

    Args:
        users: model folders, each with the class whose plan it is.
    """

    @cache
    def read(experts: str) -> ExpertLayout | None:
        layouts = [
            layout_of(folder, describe(folder, experts, owner.rpartition(".")[2]))
            for folder, owner in dict.fromkeys(users)
        ]
        if not layouts or None in layouts:
            return None
        known = [layout for layout in layouts if layout is not None]
        return next((layout for layout in known if layout.irregularity), known[0])

    return read
