"""Owners to copies: which plans change together, and whether they may."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from codemods.module import PlanLiteral
from codemods.ownership import Lost, Place, Tree
from codemods.rewrite import edited
from codemods.sources import shown
from plans.decompose import Decomposition, Edit
from plans.errors import MigratorError
from plans.rule import Finding, rule

__all__ = ["Family", "Transform", "Verdict", "about", "families", "judge"]


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


Transform = Callable[[Tree, Family], Mapping[Place, Decomposition]]
"""Works out what becomes of each place of a family."""


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


def judge(tree: Tree, family: Family, reachable: frozenset[Path], transform: Transform) -> Verdict:
    """Decide a family's edits: all of its places or none.

    Args:
        tree: reads files.
        family: an owner with its copies.
        reachable: the files that may be written.
        transform: works out what becomes of each place.
    """
    wanted = transform(tree, family)
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


def _result(tree: Tree, place: Place, wanted: Decomposition) -> list[tuple[str, str | None]]:
    """Return the entries that a plan will have: a copy may lag behind its owner by rewrites only."""
    literal = tree.plan(place)
    return edited(literal, wanted.edits) if isinstance(literal, PlanLiteral) else []


def about(tree: Tree, place: Place, code: str, where: str) -> Finding:
    """Return a finding about a whole plan, standing at its first experts entry or else at the plan."""
    literal = tree.plan(place)
    keys = (entry.key for entry in literal.entries) if isinstance(literal, PlanLiteral) else iter(())
    key = next((key for key in keys if "experts" in key), place.attribute)
    return Finding(code, key, rule(code).message.format(key=key, where=where))
