"""Who uses a plan: the classes that write it, and those in other files that inherit it or take it in from there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from codemods.inheritance.ownership import PlanLocation, Tree
from codemods.models.modeling import list_modeling_files

__all__ = ["Consumer", "find_consumers"]

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
