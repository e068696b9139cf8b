"""Owners to copies: which plans change together, and whether they may."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from codemods.files.sources import add_once, shown
from codemods.inheritance.missing import missing_copies
from codemods.inheritance.ownership import Lost, Place, Tree
from codemods.inheritance.related import may_come_from
from codemods.reading.module import Opaque, PlanLiteral
from codemods.rewriting.rewrite import edited
from plans.decompose import Decomposition, Edit, decided_with
from plans.errors import MigratorError
from plans.rule import Finding, rule

__all__ = ["Family", "OutOfReach", "Transform", "Verdict", "about", "families", "judge"]


@dataclass(frozen=True)
class Family:
    """An owner with every generated copy of its plan.

    Args:
        owner: where a person edits.
        copies: where the modular converter writes the same plan.
        doubtful: plans of generated files that say the same, but whose way to an owner is lost.
    """

    owner: Place
    copies: tuple[Place, ...]
    doubtful: tuple[Place, ...] = ()

    @property
    def places(self) -> tuple[Place, ...]:
        """The owner first, then the copies."""
        return (self.owner, *self.copies)


Transform = Callable[[Tree, Family], Mapping[Place, Decomposition]]
"""Works out what becomes of each place of a family."""

OutOfReach = Callable[[Path], str | None]
"""From a file to the reason in words why it may not be written, None where it may."""


@dataclass(frozen=True)
class Verdict:
    """What is to be done to a family and said of it, each with the place it belongs to.

    Args:
        edits: of every place, or of none.
        findings: what a person should know.
        held: the keys of experts modules, and of other entries, that must not be edited in any literal of the plan.
    """

    edits: Mapping[Place, tuple[Edit, ...]]
    findings: tuple[tuple[Place, Finding], ...]
    held: frozenset[str] = frozenset()


def families(
    tree: Tree, places: Iterable[Place], errors: list[MigratorError]
) -> tuple[list[Family], list[tuple[Place, Finding]]]:
    """Group plan literals under their owners; copies whose owner is lost become findings.

    Args:
        tree: reads files.
        places: where plans are assigned.
        errors: takes those of files on the way to an owner that cannot be read.
    """
    places = tuple(places)
    owners, unknown = _owners(tree, places, errors)
    copies: dict[Place, list[Place]] = {owner: [] for owner in owners.values()}
    for place, owner in owners.items():
        copies[owner] += [place] if place != owner else []
    for owner, place in missing_copies(tree, places, errors):
        if owner in copies and place not in (owner, *copies[owner]):
            copies[owner].append(place)  # at odds with its owner
            _check_modular(tree, place, errors)
    stray = [place for place, lost in unknown.items() if not (lost and lost.orphan)]
    found = [Family(owner, tuple(listed), _doubtful(tree, owner, stray)) for owner, listed in copies.items()]
    return found, [(place, about(tree, place, lost.code, lost.reason)) for place, lost in unknown.items() if lost]


def _owners(
    tree: Tree, places: Iterable[Place], errors: list[MigratorError]
) -> tuple[dict[Place, Place], dict[Place, Lost | None]]:
    """Return the owners of plans, and the plans without one with the reason, None where a file cannot be read."""
    owners: dict[Place, Place] = {}
    unknown: dict[Place, Lost | None] = {}
    for place in places:
        try:
            owner = tree.owner(place)
        except MigratorError as error:
            errors.append(error)
            unknown[place] = None
            continue
        if isinstance(owner, Place):
            owners[place] = owner
            continue
        unknown[place] = owner
        if not owner.orphan:
            _check_modular(tree, place, errors)
    return owners, unknown


def _check_modular(tree: Tree, place: Place, errors: list[MigratorError]) -> None:
    """Parse the modular file of a copy that is lost or at odds: what was read of it so far may not be all it says."""
    generated_from = tree.source(place.path).generated_from
    try:
        tree.parse(place.path.with_name(generated_from or place.path.name))
    except MigratorError as error:
        add_once(errors, error)


def _doubtful(tree: Tree, owner: Place, stray: Iterable[Place]) -> tuple[Place, ...]:
    """Return the plans with a lost owner that may be copies of this one: they say the same, and a name leads here."""
    wanted = tree.plan(owner)
    return tuple(
        place
        for place in stray
        if isinstance(wanted, PlanLiteral) and _same(tree.plan(place), wanted) and may_come_from(tree, place, owner)
    )


def _same(plan: PlanLiteral | Opaque, wanted: PlanLiteral) -> bool:
    return isinstance(plan, PlanLiteral) and plan.says_the_same_as(wanted)


def judge(tree: Tree, family: Family, out_of_reach: OutOfReach, transform: Transform) -> Verdict:
    """Decide a family's edits: all of its places or none.

    Args:
        tree: reads files.
        family: an owner with its copies.
        out_of_reach: says of a file that may not be written why.
        transform: works out what becomes of each place.
    """
    wanted = transform(tree, family)
    results = {place: _result(tree, place, wanted[place]) for place in family.places}
    if differing := [place for place in family.copies if results[place] != results[family.owner]]:
        return Verdict({}, tuple(_differing(tree, family.owner, differing)), _touched(wanted))
    edits = {place: decomposition.edits for place, decomposition in wanted.items()}
    if family.doubtful and any(edits.values()):
        stays = about(tree, family.owner, "MIG306", shown(family.doubtful[0].path))
        return Verdict({}, ((family.owner, stays),), _touched(wanted))
    reasons = [reason for place, some in edits.items() if some and (reason := out_of_reach(place.path))]
    if reasons:
        named = [place for place in family.places if not out_of_reach(place.path)]
        findings = tuple((place, about(tree, place, "MIG304", reasons[0])) for place in named)
        return Verdict({}, findings, _touched(wanted))
    disputed = frozenset(key for decomposition in wanted.values() for key in decomposition.disputed)
    return Verdict(edits, tuple((family.owner, finding) for finding in wanted[family.owner].findings), disputed)


def _differing(tree: Tree, owner: Place, differing: Iterable[Place]) -> Iterator[tuple[Place, Finding]]:
    """Yield what to say of copies that would become something else than their owner.

    One that says the same today is not at odds: other code of its class decides otherwise on the same entries.
    """
    plan = tree.plan(owner)
    copies = {place: isinstance(plan, PlanLiteral) and _same(tree.plan(place), plan) for place in differing}
    if odd := [place for place, same in copies.items() if not same]:
        yield from ((place, about(tree, place, "MIG301", owner.path.name)) for place in odd)
        return
    place = next(iter(copies))
    code = place.path.with_name(tree.source(place.path).generated_from or place.path.name)
    because = f"{shown(code)} inherits it, and code of its {place.class_name} decides on the same entries"
    yield owner, about(tree, owner, "MIG204", because)


def _touched(wanted: Mapping[Place, Decomposition]) -> frozenset[str]:
    """Return what the edits of a family are decided with."""
    return frozenset(decided_with(edit.key) for found in wanted.values() for edit in found.edits)


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
