"""Relations between plans: the models that use one, copies that should exist, and copies whose owner is lost."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from codemods.files.headers import scan_imports
from codemods.files.sources import add_error_once
from codemods.inheritance.class_graph import ClassKey
from codemods.inheritance.ownership import PlanLocation, Tree
from codemods.models.model_files import find_modeling_files
from codemods.reading.module import PlanLiteral
from plans.errors import MigratorError

__all__ = ["Consumer", "can_derive_from", "find_consumers", "find_missing_copies"]


Consumer = tuple[Path, str]
"""A model folder, and the class with the plan."""

_NAMED_CONFIGURATION = re.compile(
    r"""(?:'(?P<part>\w+)' in )?(?:[\w.]+\.__class__|type\([\w.]+\))\.__name__(?: == '(?P<whole>\w+)')?"""
)
_WORD = re.compile(rb"\w+")
_PREFIX = re.compile(r"^(?:configuration|modular|modeling)_")


def find_consumers(tree: Tree, locations: Iterable[PlanLocation]) -> tuple[Consumer, ...]:
    """Return the models that use a plan, those at its locations first.

    A class that only inherits the plan counts if it has a modeling file beside it; without one, its parent's model is
    used.

    Args:
        tree: the tree, with its configuration files added.
        locations: where the plan is written.

    Raises:
        SourceError: a file that may use the plan cannot be parsed.
    """
    locations = tuple(locations)
    consumers = {(importer.path, importer.class_name): importer for importer in _find_importers(tree, locations)}
    waiting = [*locations, *consumers.values()]
    while waiting:
        parent = waiting.pop()
        for path, name in _find_subclasses(tree, parent.class_name.rpartition(".")[2]):
            subclass = replace(parent, path=path, class_name=name)
            if (path, name) in consumers or subclass in locations or not _inherits_plan(tree, subclass, parent):
                continue
            consumers[path, name] = subclass
            waiting.append(subclass)
    others = [consumer for consumer in consumers.values() if find_modeling_files(consumer.path.parent)]
    named = {location: tuple(_find_named_models(tree, location)) for location in locations}
    own = [location for location in locations if not named[location]]
    used_by = [(location.path.parent, location.class_name) for location in (*own, *others)]
    return tuple(dict.fromkeys([*used_by, *(consumer for models in named.values() for consumer in models)]))


def _find_named_models(tree: Tree, location: PlanLocation) -> Iterator[Consumer]:
    """Yield the models that code names by their configurations' classes, as a quantizer does that has plans for some.

    Code beside a model is about that model.
    """
    plan = tree.plan(location)
    conditions = plan.conditions if isinstance(plan, PlanLiteral) else ()
    matches = [match for each in conditions if each.holds and (match := _NAMED_CONFIGURATION.fullmatch(each.test))]
    if not matches or find_modeling_files(location.path.parent):
        return
    for path, name in dict.fromkeys(key for keys in tree.configuration_subclasses.values() for key in keys):
        words = [match["part"] in name if match["part"] else match["whole"] == name for match in matches]
        if all(words) and find_modeling_files(path.parent):
            yield path.parent, name


def _find_subclasses(tree: Tree, base: str) -> Iterator[ClassKey]:
    """Yield the classes that inherit from one of a name; the index lists each class once under its own name too."""
    listed = tree.configuration_subclasses.get(base, ())
    return (key for key in dict.fromkeys(listed) if key[1] != base or listed.count(key) > 1)


def _inherits_plan(tree: Tree, subclass: PlanLocation, parent: PlanLocation) -> bool:
    """Return whether a class has a plan from another one: the plan itself, or the code that builds it."""
    if subclass.class_name not in tree.module(subclass.path).classes:
        return False
    if parent.code is not None:
        ancestors = tree.mro(subclass.path, subclass.class_name)
        return any((path, owner.name) == (parent.path, parent.class_name) for path, owner in ancestors)
    definition = tree.find_definition(subclass)
    return definition is not None and definition == tree.find_definition(parent)


def _find_importers(tree: Tree, locations: Iterable[PlanLocation]) -> Iterator[PlanLocation]:
    """Yield the classes of other files that build their plan from this one, or from a constant of its file."""
    for location in locations:
        for path in tree.importers.get(location.path.parent.name, ()):
            for name, owner in tree.module(path).classes.items() if path != location.path else ():
                importer = PlanLocation(path, name, location.attribute)
                if any(_refers_to(tree, importer, reference.text, location) for reference in owner.references):
                    yield importer


def _refers_to(tree: Tree, importer: PlanLocation, text: str, location: PlanLocation) -> bool:
    """Return whether an expression in a class is a plan, `ToyConfig.base_model_tp_plan`, or a constant of its file."""
    prefix, _, attribute = text.rpartition(".")
    name = prefix if attribute == location.attribute else text
    classes = tree.module(location.path).classes
    return any(
        path == location.path and (target == location.class_name or target not in classes)
        for path, target in tree.resolve(importer.path, importer.class_name, name)
    )


def find_missing_copies(
    tree: Tree, locations: Iterable[PlanLocation], errors: list[MigratorError]
) -> Iterator[tuple[PlanLocation, PlanLocation]]:
    """Yield each plan that a class of a generated file should have and lacks: its owner, and where it should be.

    Args:
        tree: the tree, with its modular files added.
        locations: the plans found; anything else that a generated class assigns to a plan counts as lacking.
        errors: collects the errors of files that cannot be read on the way.
    """
    written: dict[str, set[str]] = defaultdict(set)
    known: set[tuple[Path, str, str]] = set()
    for location in locations:
        if location.code is None:
            written[location.class_name].add(location.attribute)
            if tree.source(location.path).generated_from is not None:
                known.add((location.path.parent, location.class_name, location.attribute))
    for (path, name), attributes in _compute_expected_plans(tree.modular_subclasses, written).items():
        for attribute in sorted(attributes):
            if (path.parent, name, attribute) not in known:
                try:
                    yield from _find_missing(tree, PlanLocation(path, name, attribute))
                except MigratorError as error:
                    add_error_once(errors, error)


def _compute_expected_plans(
    subclasses: Mapping[str, Sequence[ClassKey]], written: Mapping[str, set[str]]
) -> dict[ClassKey, set[str]]:
    """Return the plans that each class of a modular file may have, going by names: its own and those of its bases."""
    expected: dict[ClassKey, set[str]] = defaultdict(set)
    waiting = [(name, frozenset(attributes)) for name, attributes in written.items()]
    while waiting:
        name, attributes = waiting.pop()
        for subclass in subclasses.get(name, ()):
            if new := attributes - expected[subclass]:
                expected[subclass] |= new
                waiting.append((subclass[1], new))
    return expected


def _find_missing(tree: Tree, location: PlanLocation) -> Iterator[tuple[PlanLocation, PlanLocation]]:
    """Yield a plan of a modular file's class, if it has one, for each generated class that lacks it."""
    owner = tree.find_origin(location)
    if not isinstance(owner, PlanLocation) or not isinstance(tree.plan(owner), PlanLiteral):
        return
    for path in sorted(location.path.parent.glob("*.py")):
        copy = replace(location, path=path)
        if tree.source(path).generated_from == location.path.name and _lacks_plan(tree, copy):
            yield owner, copy


def _lacks_plan(tree: Tree, location: PlanLocation) -> bool:
    """Return whether a class exists and either has no plan or writes one that is not among those found."""
    owner = tree.module(location.path).classes.get(location.class_name)
    return owner is not None and (location.attribute in owner.plans or not tree.has_plan(location))


def can_derive_from(tree: Tree, copy: PlanLocation, owner: PlanLocation) -> bool:
    """Return whether a copy's modular file names an owner's class or model, or a class or model that inherits it.

    Args:
        tree: the tree.
        copy: a plan in a generated file whose owner cannot be found.
        owner: a plan with the same entries.
    """
    generated_from = tree.source(copy.path).generated_from
    if generated_from is None:
        return False
    family = {(owner.path, owner.class_name.rpartition(".")[2])}
    waiting = list(family)
    while waiting:
        _, parent = waiting.pop()
        subclasses = {
            *tree.modular_subclasses.get(parent, ()),
            *tree.configuration_subclasses.get(parent, ()),
        } - family
        family |= subclasses
        waiting += subclasses
    lines = b"\n" + tree.source(copy.path.with_name(generated_from)).data
    words = {word.decode("utf-8", "replace") for word in _WORD.findall(lines)}
    models = {
        _PREFIX.sub("", part)
        for statement in scan_imports(lines)
        for module in statement.modules
        for part in module.split(".")
    }
    others = [(path.parent, name) for path, name in family if path.parent != copy.path.parent]
    return any(name in words or folder.name in models for folder, name in others)
