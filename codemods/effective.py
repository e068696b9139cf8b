"""Effective plans: what every class's plans hold, inherited entries included, worked out from source alone.

Classes inherit as Python's do, across files. A plan's own value replaces an inherited one whole. What code makes of a
plan in a function, or under a condition, is a plan of its own here, with an entry for each that it adds or takes out;
classes inherit it with the function. Values that are no literals, and what an expression takes over from another plan
(`{**Parent.plan}`), are not followed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from codemods.imports import imported, local_class, module_files
from codemods.literals import read_module
from codemods.module import ClassPlans, Condition, Module, PlanLiteral, Removal
from codemods.sources import Source
from plans.errors import SourceError

__all__ = [
    "EVERY_KEY",
    "REMOVED",
    "EffectiveEntry",
    "EffectivePlans",
    "PlanPlace",
    "SourceOf",
    "file_kind",
]

SourceOf = Callable[[Path], Source | None]
"""From a path to that file, None where there is none."""

REMOVED = "removed by code"
"""Stands for the style of an entry that code takes out of a plan; no dialect has a style of that name."""

EVERY_KEY = "*"
"""Stands for the keys of a plan that code empties or replaces."""

_Ancestor = tuple[Path, ClassPlans]
_Written = tuple[str, str, tuple[Condition, ...]]
"""Which plan, in which function and under which conditions; a class body is no function."""

_MODEL_FILE = re.compile(r"(configuration|modeling)_\w+\.py")


@dataclass(frozen=True)
class PlanPlace:
    """Which plan of which class.

    Args:
        path: the class's file.
        class_name: the class.
        plan: the attribute; of what code adds, with the function and the conditions around it.
    """

    path: Path
    class_name: str
    plan: str


@dataclass(frozen=True)
class EffectiveEntry:
    """One entry of an effective plan.

    Args:
        style: None where it is computed; `REMOVED` where code takes it out.
        path: the file that it is written in, not always the class's own.
        line: where it stands there, counted from 1.
    """

    style: str | None
    path: Path
    line: int


@dataclass
class EffectivePlans:
    """The effective plans of a set of files, each parsed at most once."""

    source_of: SourceOf
    _modules: dict[Path, Module | None] = field(default_factory=dict)
    _lineages: dict[tuple[Path, str], tuple[_Ancestor, ...]] = field(default_factory=dict)

    def of_file(self, path: Path) -> dict[PlanPlace, Mapping[str, EffectiveEntry]]:
        """Return every plan of a file's classes by place, each from key to entry; of a file that is gone, none.

        Raises:
            SourceError: the file, or one that it inherits from, does not parse or inherits without end.
        """
        try:
            return self._of_file(path)
        except RecursionError as error:
            self._lineages.clear()  # unfinished ones look like circles
            raise SourceError(
                f"{path}: its classes inherit too deeply to follow", hint="leave it out", path=str(path)
            ) from error

    def _of_file(self, path: Path) -> dict[PlanPlace, Mapping[str, EffectiveEntry]]:
        module = self._module(path)
        return {
            PlanPlace(path, name, _label(*written)): plan
            for name in (module.classes if module else ())
            for written, plan in self._plans(path, name).items()
        }

    def classes(self, path: Path) -> frozenset[str]:
        """Return the names of a file's classes; of a file that is gone, none."""
        module = self._module(path)
        return frozenset(module.classes) if module else frozenset()

    def _plans(self, path: Path, class_name: str) -> dict[_Written, Mapping[str, EffectiveEntry]]:
        """Return the plans of a class: what class bodies assign, and what functions and conditions make of it."""
        plans: dict[_Written, Mapping[str, EffectiveEntry]] = {}
        for file, owner in reversed(self._lineage(path, class_name)):
            for attribute, plan in owner.plans.items():
                plans = {written: one for written, one in plans.items() if written[:2] != (attribute, "")}
                plans[attribute, "", ()] = _entries(file, plan) if isinstance(plan, PlanLiteral) else {}
            changes: list[PlanLiteral | Removal] = [*owner.code, *owner.removals]
            for change in sorted(changes, key=lambda change: change.line):
                written = change.attribute, change.function, change.conditions
                plans[written] = {**plans.get(written, {}), **_effect(file, change)}
        return plans

    def _lineage(self, path: Path, class_name: str) -> tuple[_Ancestor, ...]:
        """Return a class and its bases in the order in which Python looks an attribute up."""
        if (path, class_name) not in self._lineages:
            self._lineages[path, class_name] = ()  # where a class is its own ancestor, the circle ends here
            found = list(self._ancestors(path, class_name))
            last = {(file, owner.name): (file, owner) for file, owner in reversed(found)}
            self._lineages[path, class_name] = tuple(reversed(last.values()))
        return self._lineages[path, class_name]

    def _ancestors(self, path: Path, class_name: str) -> Iterator[_Ancestor]:
        """Yield a class, then the lineage of each base; what two bases share comes twice."""
        module = self._module(path)
        if module is None:
            return
        owner = module.classes.get(class_name)
        if owner is None:
            yield from self._imported(path, module, class_name)
            return
        yield path, owner
        for base in owner.bases:
            name = local_class(module, class_name, base)
            yield from self._lineage(path, name) if name else self._imported(path, module, base)

    def _imported(self, path: Path, module: Module, name: str) -> Iterator[_Ancestor]:
        for meant in imported(module, name):
            for file in module_files(path, meant.level, meant.module):
                yield from self._lineage(file, meant.class_name)

    def _module(self, path: Path) -> Module | None:
        if path not in self._modules:
            source = self.source_of(path)
            self._modules[path] = read_module(source) if source else None
        return self._modules[path]


def file_kind(path: PurePath) -> str | None:
    """Return which of a model's files this is, None for one whose classes no model reads.

    Modular files are none: they only own what generated files say. Classes inherit from files of their own kind.
    """
    match = _MODEL_FILE.fullmatch(path.name)
    return match[1] if match else None


def _entries(path: Path, literal: PlanLiteral) -> dict[str, EffectiveEntry]:
    return {entry.key: EffectiveEntry(entry.style, path, entry.line) for entry in literal.entries}


def _effect(path: Path, change: PlanLiteral | Removal) -> dict[str, EffectiveEntry]:
    """Return what code makes of a plan: the entries that it adds, and those that it takes out."""
    if isinstance(change, Removal):
        return {change.key or EVERY_KEY: EffectiveEntry(REMOVED, path, change.line)}
    replaced = {EVERY_KEY: EffectiveEntry(REMOVED, path, change.line)} if change.replaces and change.function else {}
    return replaced | _entries(path, change)


def _label(attribute: str, function: str, conditions: tuple[Condition, ...]) -> str:
    tests = [f"if {one.test}" if one.holds else f"if not ({one.test})" for one in conditions]
    return " ".join([attribute, *([f"in {function}"] if function else []), *tests])
