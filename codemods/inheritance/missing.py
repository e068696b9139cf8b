"""Plans that generated files lack although their modular file's classes have them.

A generated file that lost its plan says nothing that would lead to the owner, so the way goes from the owners: every
class of a modular file should have in its generated file what it or one of its bases writes. The names of the classes
say of nearly all that nothing is missing; only what is left is followed from file to file.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from codemods.files.sources import add_error_once
from codemods.inheritance.ownership import PlanLocation, Tree
from codemods.reading.module import PlanLiteral
from plans.errors import MigratorError

__all__ = ["find_missing_copies"]

_Class = tuple[Path, str]
"""A class of a modular file."""


def find_missing_copies(
    tree: Tree, locations: Iterable[PlanLocation], errors: list[MigratorError]
) -> Iterator[tuple[PlanLocation, PlanLocation]]:
    """Yield each plan that a class of a generated file should have and lacks: its owner, and where it should be.

    Args:
        tree: has the modular files to look at.
        locations: the plans that were found; what else a generated class assigns counts as lacking.
        errors: takes those of files on the way that cannot be read.
    """
    written: dict[str, set[str]] = defaultdict(set)
    known: set[tuple[Path, str, str]] = set()
    for place in locations:
        if place.code is None:
            written[place.class_name].add(place.attribute)
            if tree.source(place.path).generated_from is not None:
                known.add((place.path.parent, place.class_name, place.attribute))
    for (path, name), attributes in _compute_expected_plans(tree.modular_subclasses, written).items():
        for attribute in sorted(attributes):
            if (path.parent, name, attribute) not in known:
                try:
                    yield from _find_missing(tree, PlanLocation(path, name, attribute))
                except MigratorError as error:
                    add_error_once(errors, error)


def _compute_expected_plans(
    subclasses: Mapping[str, Sequence[_Class]], written: Mapping[str, set[str]]
) -> dict[_Class, set[str]]:
    """Return the plans that each class of a modular file may have: by name, its own and those of its bases."""
    expected: dict[_Class, set[str]] = defaultdict(set)
    waiting = [(name, frozenset(attributes)) for name, attributes in written.items()]
    while waiting:
        name, attributes = waiting.pop()
        for heir in subclasses.get(name, ()):
            if new := attributes - expected[heir]:
                expected[heir] |= new
                waiting.append((heir[1], new))
    return expected


def _find_missing(tree: Tree, location: PlanLocation) -> Iterator[tuple[PlanLocation, PlanLocation]]:
    """Yield the plan of a modular file's class if it has one and its generated class has none."""
    owner = tree.find_origin(location)
    if not isinstance(owner, PlanLocation) or not isinstance(tree.plan(owner), PlanLiteral):
        return
    for path in sorted(location.path.parent.glob("*.py")):
        copy = replace(location, path=path)
        if tree.source(path).generated_from == location.path.name and _lacks_plan(tree, copy):
            yield owner, copy


def _lacks_plan(tree: Tree, location: PlanLocation) -> bool:
    """Say whether a class is in a file without having a plan, or writes another one than those that were found."""
    found = tree.module(location.path).classes.get(location.class_name)
    return found is not None and (location.attribute in found.plans or not tree.has_plan(location))
