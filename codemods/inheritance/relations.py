"""Who uses a plan: the classes that write it, and those in other files that inherit it or take it in from there."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from codemods.files.sources import add_error_once
from codemods.inheritance.ownership import PlanLocation, Tree
from codemods.models.modeling import list_modeling_files
from codemods.reading.module import PlanLiteral
from plans.errors import MigratorError

__all__ = ["Consumer", "can_derive_from", "find_consumers", "find_missing_copies"]


Consumer = tuple[Path, str]
"""A model folder, and the class with the plan."""


def find_consumers(tree: Tree, locations: Iterable[PlanLocation]) -> tuple[Consumer, ...]:
    """Return the models that use a plan, those of its places first.

    A class that only inherits counts where a modeling file lies beside it: without one its model is its parent's.

    Args:
        tree: has the configuration files to look at.
        locations: where the plan is written.

    Raises:
        SourceError: a file that may use it does not parse.
    """
    locations = tuple(locations)
    others = {(place.path, place.class_name): place for place in _find_importers(tree, locations)}
    waiting = [*locations, *others.values()]
    while waiting:
        parent = waiting.pop()
        for path, name in _find_subclasses(tree, parent.class_name.rpartition(".")[2]):
            heir = replace(parent, path=path, class_name=name)
            if (path, name) not in others and heir not in locations and _inherits_plan(tree, heir, parent):
                others[path, name] = heir
                waiting.append(heir)
    inheriting = [place for place in others.values() if list_modeling_files(place.path.parent)]
    return tuple(dict.fromkeys((place.path.parent, place.class_name) for place in (*locations, *inheriting)))


def _find_subclasses(tree: Tree, base: str) -> Iterator[tuple[Path, str]]:
    """Yield the classes that inherit from one of a name; each class is also listed once under its own."""
    listed = tree.configuration_subclasses.get(base, ())
    return (heir for heir in dict.fromkeys(listed) if heir[1] != base or listed.count(heir) > 1)


def _inherits_plan(tree: Tree, subclass: PlanLocation, parent: PlanLocation) -> bool:
    """Say whether a class has a plan from another: the plan itself, or the code that makes it."""
    if subclass.class_name not in tree.module(subclass.path).classes:
        return False
    if parent.code is not None:
        return parent in tree.mro(subclass)
    holder, owner = tree.find_definition(subclass), tree.find_definition(parent)
    return holder is not None and holder == owner


def _find_importers(tree: Tree, locations: Iterable[PlanLocation]) -> Iterator[PlanLocation]:
    """Yield the classes of other files that make their plan of this one, or of a constant of its file."""
    for place in locations:
        for path in tree.importers.get(place.path.parent.name, ()):
            for name, owner in tree.module(path).classes.items() if path != place.path else ():
                taker = PlanLocation(path, name, place.attribute)
                if any(_refers_to(tree, taker, taken.text, place) for taken in owner.references):
                    yield taker


def _refers_to(tree: Tree, importer: PlanLocation, text: str, location: PlanLocation) -> bool:
    """Say whether an expression in a class is a plan, `ToyConfig.base_model_tp_plan`, or a constant of its file."""
    name, _, attribute = text.rpartition(".")
    meant = tree.resolve_name(importer, name if attribute == location.attribute else text)
    if meant is None or meant.path != location.path:
        return False
    return meant.class_name == location.class_name or meant.class_name not in tree.module(location.path).classes


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


_IMPORT = re.compile(rb"^[ \t]*(?:from|import)[ \t]+([\w. \t]+)", re.MULTILINE)
_WORD = re.compile(rb"\w+")
_PREFIX = re.compile(r"^(?:configuration|modular|modeling)_")


def can_derive_from(tree: Tree, copy: PlanLocation, owner: PlanLocation) -> bool:
    """Say whether the modular file of a copy names a plan's class, its model, or a class or model that inherits it.

    Args:
        tree: reads files.
        copy: a plan in a generated file, the way from which to its owner is lost.
        owner: a plan that says the same.
    """
    generated_from = tree.source(copy.path).generated_from
    if generated_from is None:
        return False
    data = tree.source(copy.path.with_name(generated_from)).data
    classes = {(owner.path, owner.class_name.rpartition(".")[2])}
    waiting = list(classes)
    while waiting:
        _, parent = waiting.pop()
        new = {
            heir
            for by_name in (tree.modular_subclasses, tree.configuration_subclasses)
            for heir in by_name.get(parent, ())
        } - classes
        classes |= new
        waiting += new
    others = {(path.parent, name) for path, name in classes if path.parent != copy.path.parent}
    words = {word.decode("utf-8", "replace") for word in _WORD.findall(data)}
    modules = {
        _PREFIX.sub("", word.decode("utf-8", "replace"))
        for line in _IMPORT.findall(data)
        for word in _WORD.findall(line)
    }
    return any(name in words or folder.name in modules for folder, name in others)
