"""Who uses a plan: the classes that write it, and those in other files that inherit it or take it in from there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from codemods.inheritance.ownership import Place, Tree
from codemods.models.modeling import modeling_files

__all__ = ["User", "users"]

User = tuple[Path, str]
"""A model folder, and the class with the plan."""


def users(tree: Tree, places: Iterable[Place]) -> tuple[User, ...]:
    """Return the models that use a plan, those of its places first.

    A class that only inherits counts where a modeling file lies beside it: without one its model is its parent's.

    Args:
        tree: has the configuration files to look at.
        places: where the plan is written.

    Raises:
        SourceError: a file that may use it does not parse.
    """
    places = tuple(places)
    others = {(place.path, place.class_name): place for place in _takers(tree, places)}
    waiting = [*places, *others.values()]
    while waiting:
        parent = waiting.pop()
        for path, name in _heirs(tree, parent.class_name.rpartition(".")[2]):
            heir = replace(parent, path=path, class_name=name)
            if (path, name) not in others and heir not in places and _inherits(tree, heir, parent):
                others[path, name] = heir
                waiting.append(heir)
    inheriting = [place for place in others.values() if modeling_files(place.path.parent)]
    return tuple(dict.fromkeys((place.path.parent, place.class_name) for place in (*places, *inheriting)))


def _heirs(tree: Tree, base: str) -> Iterator[tuple[Path, str]]:
    """Yield the classes that inherit from one of a name; each class is also listed once under its own."""
    listed = tree.configurations.get(base, ())
    return (heir for heir in dict.fromkeys(listed) if heir[1] != base or listed.count(heir) > 1)


def _inherits(tree: Tree, heir: Place, parent: Place) -> bool:
    """Say whether a class has a plan from another: the plan itself, or the code that makes it."""
    if heir.class_name not in tree.module(heir.path).classes:
        return False
    if parent.code is not None:
        return parent in tree.lineage(heir)
    holder, owner = tree.holder(heir), tree.holder(parent)
    return holder is not None and holder == owner


def _takers(tree: Tree, places: Iterable[Place]) -> Iterator[Place]:
    """Yield the classes of other files that make their plan of this one, or of a constant of its file."""
    for place in places:
        for path in tree.importers.get(place.path.parent.name, ()):
            for name, owner in tree.module(path).classes.items() if path != place.path else ():
                taker = Place(path, name, place.attribute)
                if any(_means(tree, taker, taken.text, place) for taken in owner.taken):
                    yield taker


def _means(tree: Tree, taker: Place, text: str, place: Place) -> bool:
    """Say whether an expression in a class is a plan, `ToyConfig.base_model_tp_plan`, or a constant of its file."""
    name, _, attribute = text.rpartition(".")
    meant = tree.meant(taker, name if attribute == place.attribute else text)
    if meant is None or meant.path != place.path:
        return False
    return meant.class_name == place.class_name or meant.class_name not in tree.module(place.path).classes
