"""Owners to copies: which plans change together, and whether they may."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from codemods.layouts import read_layouts
from codemods.module import Opaque, PlanLiteral
from codemods.ownership import Lost, Place, Tree
from codemods.rewrite import edited
from codemods.sources import shown
from plans.decompose import Decomposition, Edit, InsertEntry, LayoutReader, decompose
from plans.errors import MigratorError
from plans.layout import ExpertLayout
from plans.rule import Finding, rule

_EXPERT_PARAMETER = re.compile(r"experts\.(?:gate_up_proj|up_proj|down_proj)$")

__all__ = ["Family", "Verdict", "about", "families", "judge"]


@dataclass(frozen=True)
class Family:
    """An owner with every generated copy of its plan.

    Args:
        owner: where a person edits.
        copies: where the modular converter writes the same plan.
    """

    owner: Place
    copies: tuple[Place, ...]

    @property
    def places(self) -> tuple[Place, ...]:
        """The owner first, then the copies."""
        return (self.owner, *self.copies)


@dataclass(frozen=True)
class Verdict:
    """What is to be done to a family and said of it, each with the place it belongs to."""

    edits: Mapping[Place, tuple[Edit, ...]]
    findings: tuple[tuple[Place, Finding], ...]


def families(
    tree: Tree, places: Iterable[Place], errors: list[MigratorError]
) -> tuple[list[Family], list[tuple[Place, Finding]]]:
    """Group plan literals under their owners; copies whose owner is lost become findings.

    Args:
        tree: reads files.
        places: where plans are assigned.
        errors: takes those of files on the way to an owner that cannot be read.
    """
    copies: dict[Place, list[Place]] = {}
    lost: list[tuple[Place, Finding]] = []
    for place in places:
        try:
            owner = tree.owner(place)
        except MigratorError as error:
            errors.append(error)
            continue
        if isinstance(owner, Lost):
            lost.append((place, about(tree, place, owner.code, owner.reason)))
            continue
        known = copies.setdefault(owner, [])
        if owner != place:
            known.append(place)
    return [Family(owner, tuple(found)) for owner, found in copies.items()], lost


def judge(tree: Tree, family: Family, reachable: frozenset[Path]) -> Verdict:
    """Decide a family's edits: all of its places or none.

    Args:
        tree: reads files.
        family: an owner with its copies.
        reachable: the files that may be written.
    """
    layout_of = _layout_reader([place.path.parent for place in family.places])
    wanted = {place: _decompose(tree, place, layout_of) for place in family.places}
    results = {place: _result(tree, place, wanted[place]) for place in family.places}
    if at_odds := [place for place in family.copies if results[place] != results[family.owner]]:
        where = family.owner.path.name
        return Verdict({}, tuple((place, about(tree, place, "MIG301", where)) for place in at_odds))
    edits = {place: decomposition.edits for place, decomposition in wanted.items()}
    outside = [place.path for place, some in edits.items() if some and place.path not in reachable]
    if outside:
        named = [place for place in family.places if place.path in reachable]
        return Verdict({}, tuple((place, about(tree, place, "MIG304", shown(outside[0]))) for place in named))
    return Verdict(edits, tuple((family.owner, finding) for finding in wanted[family.owner].findings))


def _decompose(tree: Tree, place: Place, layout_of: LayoutReader) -> Decomposition:
    literal = tree.plan(place)
    plan = literal.plan if isinstance(literal, PlanLiteral) else {}
    return _writable(literal, decompose(plan, layout_of, _beside(tree, place)))


def _result(tree: Tree, place: Place, wanted: Decomposition) -> list[tuple[str, str | None]]:
    """Return the entries that a plan will have: a copy may lag behind its owner by rewrites only."""
    literal = tree.plan(place)
    return edited(literal, wanted.edits) if isinstance(literal, PlanLiteral) else []


def _beside(tree: Tree, place: Place) -> dict[str, str]:
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
    message = rule("MIG204").message
    findings += (Finding("MIG204", key, message.format(key=key)) for key in dict.fromkeys((*computed, *lost, *unseen)))
    return Decomposition(tuple(edits), tuple(findings))


def _layout_reader(folders: Sequence[Path]) -> LayoutReader:
    """Return a reader that lets every model speak that uses the plan: the first irregular layout decides."""

    @cache
    def read(_experts: str) -> ExpertLayout | None:
        layouts = [layout for folder in dict.fromkeys(folders) for layout in read_layouts(folder)]
        if not layouts or None in layouts:
            return None
        known = [layout for layout in layouts if layout is not None]
        return next((layout for layout in known if layout.irregularity), known[0])

    return read


def about(tree: Tree, place: Place, code: str, where: str) -> Finding:
    """Return a finding about a whole plan, standing at its first experts entry or else at the plan."""
    literal = tree.plan(place)
    keys = (entry.key for entry in literal.entries) if isinstance(literal, PlanLiteral) else iter(())
    key = next((key for key in keys if "experts" in key), place.attribute)
    return Finding(code, key, rule(code).message.format(key=key, where=where))
