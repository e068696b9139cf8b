"""Effective plans: what every class's plans hold, inherited entries included, worked out from source alone.

Classes inherit as Python's do, across files. A plan's own value replaces an inherited one whole. What code adds to a
plan in a function is a plan of its own here, and counts for the class that the function stands in. Values that are
no literals, and what an expression takes over from another plan (`{**Parent.plan}`), are not followed.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path, PurePath

from codemods.literals import read_module
from codemods.module import ClassPlans, Module, PlanLiteral
from codemods.sources import Source
from plans.errors import SourceError

__all__ = ["EffectiveEntry", "EffectivePlans", "PlanPlace", "SourceOf", "file_kind", "inheritors"]

SourceOf = Callable[[Path], Source | None]
"""From a path to that file, None where there is none."""

_Ancestor = tuple[Path, ClassPlans]
_MODEL_FILE = re.compile(r"(configuration|modeling)_\w+\.py")
_CLASS = re.compile(rb"^[ \t]*class[ \t]+\w+[ \t]*\(([^)]*)\)", re.MULTILINE)
_IMPORT = re.compile(
    rb"^[ \t]*from[ \t]+(\.+|(?=transformers\.))(\w[\w.]*)[ \t]+import[ \t]+(\([^)]*\)|[^\n]+)", re.MULTILINE
)
_NAME = re.compile(rb"\w+")


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
        style: None where it is computed.
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
        found: dict[PlanPlace, Mapping[str, EffectiveEntry]] = {}
        for owner in module.classes.values() if module else ():
            for attribute, plan in self._inherited(path, owner.name).items():
                found[PlanPlace(path, owner.name, attribute)] = plan
            for literal in owner.code:
                place = PlanPlace(path, owner.name, _label(literal))
                found[place] = {**found.get(place, {}), **_entries(path, literal)}
        return found

    def classes(self, path: Path) -> frozenset[str]:
        """Return the names of a file's classes; of a file that is gone, none."""
        module = self._module(path)
        return frozenset(module.classes) if module else frozenset()

    def _inherited(self, path: Path, class_name: str) -> dict[str, Mapping[str, EffectiveEntry]]:
        plans: dict[str, Mapping[str, EffectiveEntry]] = {}
        for file, owner in reversed(self._lineage(path, class_name)):
            for attribute, plan in owner.plans.items():
                plans[attribute] = _entries(file, plan) if isinstance(plan, PlanLiteral) else {}
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
            if base in module.classes and base != class_name:
                yield from self._lineage(path, base)
            else:
                yield from self._imported(path, module, base)

    def _imported(self, path: Path, module: Module, name: str) -> Iterator[_Ancestor]:
        if name in module.imports:
            for file in _module_files(path, *module.imports[name]):
                yield from self._lineage(file, name)

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


def inheritors(changed: Iterable[Path], files: Iterable[Path], source_of: SourceOf) -> frozenset[Path]:
    """Return the changed files, and those among `files` whose classes inherit from theirs, however indirectly.

    Nothing is parsed for it: a file counts where a name that it imports stands among its classes' bases.
    """
    importers: dict[Path, list[tuple[Source, frozenset[bytes]]]] = defaultdict(list)
    for source in filter(None, map(source_of, files)):
        for imported, names in _imports(source):
            importers[imported].append((source, names))
    found = set(changed)
    waiting = list(found)
    while waiting:
        children = importers[waiting.pop()]
        new = {source.path for source, names in children if source.path not in found and _is_base(source, names)}
        found |= new
        waiting += new
    return frozenset(found)


def _imports(source: Source) -> Iterator[tuple[Path, frozenset[bytes]]]:
    """Yield the files that a file's imports from its package may lead to, with the names they bring in."""
    for dots, module, names in _IMPORT.findall(source.data):
        for file in _module_files(source.path, len(dots), module.decode()):
            yield file, frozenset(_NAME.findall(names))


def _is_base(source: Source, names: frozenset[bytes]) -> bool:
    return any(not names.isdisjoint(_NAME.findall(bases)) for bases in _CLASS.findall(source.data))


@cache
def _module_files(path: Path, level: int, module: str) -> tuple[Path, ...]:
    """Return where an import may lead: a module, or a model package that re-exports its configuration.

    Args:
        path: the importing file.
        level: the number of dots; without any, the package lies beside some folder above the file.
        module: what follows them.
    """
    bases = path.parents[level - 1 : level] if level else path.parents
    targets = [base.joinpath(*module.split(".")) for base in bases]
    return tuple(
        file for target in targets for file in (target.with_suffix(".py"), target / f"configuration_{target.name}.py")
    )


def _entries(path: Path, literal: PlanLiteral) -> dict[str, EffectiveEntry]:
    return {entry.key: EffectiveEntry(entry.style, path, entry.line) for entry in literal.entries}


def _label(literal: PlanLiteral) -> str:
    conditions = [f"if {one.test}" if one.holds else f"if not ({one.test})" for one in literal.conditions]
    return " ".join([literal.attribute, f"in {literal.function}" if literal.function else "", *conditions]).strip()
