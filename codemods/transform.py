"""What becomes of a family of plans: the param-level decomposition, or a translation into another dialect."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path

from codemods.describe import describe
from codemods.layouts import read_layouts
from codemods.module import Opaque, PlanLiteral
from codemods.ownership import Place, Tree
from codemods.propagate import Family
from plans.decompose import Decomposition, InsertEntry, LayoutReader, decompose
from plans.described import Described, Describer
from plans.dialect import Dialect
from plans.layout import ExpertLayout
from plans.plan import plan_kind
from plans.rule import Finding, rule
from plans.translate import translate

__all__ = ["beside", "to_dialect", "to_param_level"]

_EXPERT_PARAMETER = re.compile(r"experts\.(?:gate_up_proj|up_proj|down_proj)$")


def to_param_level(tree: Tree, family: Family) -> Mapping[Place, Decomposition]:
    """Decompose the expert entries of a family's plans, where every model that uses them has the regular layout."""
    plans = [tree.plan(place) for place in family.places]
    keys = frozenset(key for plan in plans if isinstance(plan, PlanLiteral) for key in plan.plan)
    layout_of = _layout_reader([(place.path.parent, place.class_name) for place in family.places], keys)
    return {place: _decomposed(tree, place, layout_of) for place in family.places}


def to_dialect(source: Dialect, target: Dialect, tree: Tree, family: Family) -> Mapping[Place, Decomposition]:
    """Translate a family's plans by meaning; what a key names must be the same in every model that uses it."""
    describer = partial(_described, frozenset((place.path.parent, place.class_name) for place in family.places))
    return {place: _translated(source, target, tree, place, describer) for place in family.places}


def _decomposed(tree: Tree, place: Place, layout_of: LayoutReader) -> Decomposition:
    literal = tree.plan(place)
    plan = literal.plan if isinstance(literal, PlanLiteral) else {}
    return _writable(literal, decompose(plan, layout_of, beside(tree, place)))


def _translated(source: Dialect, target: Dialect, tree: Tree, place: Place, describer: Describer) -> Decomposition:
    literal = tree.plan(place)
    kind = plan_kind(place.attribute)
    if not isinstance(literal, PlanLiteral) or kind is None:
        return Decomposition((), ())
    wanted = translate(literal.plan, source, target, describer, kind)
    computed = [entry.key for entry in literal.entries if entry.style is None]
    return Decomposition(wanted.edits, (*wanted.findings, *_not_writable(computed)))


def _described(users: frozenset[tuple[Path, str]], key: str) -> Described | None:
    """Return what a key names in every model that uses the plan, None where two of them differ."""
    found = {describe(folder, key, owner.rpartition(".")[2]) for folder, owner in users}
    kinds = {(one.named, one.rank) if one else None for one in found}
    return next(iter(found)) if len(kinds) == 1 else None


def beside(tree: Tree, place: Place) -> dict[str, str]:
    """Return the entries that other literals of the class put into the same plan."""
    owner = tree.module(place.path).classes[place.class_name]
    others = [owner.plans.get(place.attribute), *(code for code in owner.code if code.attribute == place.attribute)]
    this = tree.plan(place)
    return {
        key: style
        for other in others
        if isinstance(other, PlanLiteral) and other is not this
        for key, style in other.plan.items()
    }


def _writable(literal: PlanLiteral | Opaque, wanted: Decomposition) -> Decomposition:
    """Turn what cannot be written safely into findings.

    That is: entries with computed styles, new entries without a place for them, and whatever depends on entries that
    the plan takes in from elsewhere and that nobody here can see.
    """
    if not isinstance(literal, PlanLiteral):
        return wanted
    computed = [entry.key for entry in literal.entries if entry.style is None and _EXPERT_PARAMETER.search(entry.key)]
    fixed = {entry.key for entry in literal.entries if literal.takes_in or not entry.can_precede}
    unseen = [found.key for found in wanted.findings if literal.takes_in and found.code == "MIG202"]
    edits = [edit for edit in wanted.edits if not (isinstance(edit, InsertEntry) and edit.anchor in fixed)]
    lost = [edit.anchor for edit in wanted.edits if edit not in edits and isinstance(edit, InsertEntry)]
    findings = [found for found in wanted.findings if found.key not in unseen]
    return Decomposition(tuple(edits), (*findings, *_not_writable([*computed, *lost, *unseen])))


def _not_writable(keys: Sequence[str]) -> list[Finding]:
    message = rule("MIG204").message
    return [Finding("MIG204", key, message.format(key=key)) for key in dict.fromkeys(keys)]


def _layout_reader(users: Sequence[tuple[Path, str]], keys: frozenset[str]) -> LayoutReader:
    """Return a reader that lets every model speak that uses the plan: the first irregular layout decides.

    Args:
        users: model folders, each with the class whose plan it is.
        keys: of the plan.
    """

    @cache
    def read(experts: str) -> ExpertLayout | None:
        packed = f"{experts}.gate_up_proj" in keys
        layouts = [_layout_in(folder, owner, experts, packed) for folder, owner in dict.fromkeys(users)]
        if not layouts or None in layouts:
            return None
        known = [layout for layout in layouts if layout is not None]
        return next((layout for layout in known if layout.irregularity), known[0])

    return read


def _layout_in(folder: Path, owner: str, experts: str, packed: bool) -> ExpertLayout | None:
    """Return the layout of the class that a key's experts are made of in one model, None where that does not show.

    A plan that names the packed parameter itself can only mean the one class of the folder that has it.
    """
    layouts = read_layouts(folder)
    if packed and len(layouts) == 1:
        return layouts[0]
    named = describe(folder, experts, owner.rpartition(".")[2])
    if named is not None:
        layouts = tuple(layout for layout in layouts if layout is not None and layout.where == named.where)
    return layouts[0] if layouts and len(set(layouts)) == 1 else None
