"""Which files' plans a change may affect: those of classes that inherit, and those built from what others define."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from codemods.files.headers import ImportStatement, scan_aliases, scan_classes, scan_imports
from codemods.files.sources import SourceFile, is_skipped
from codemods.inheritance.conflicts import FRAMEWORK_FILES
from codemods.inheritance.effective import EffectivePlans, file_kind
from codemods.inheritance.file_graph import SourceLookup, list_module_files
from codemods.reading.module import Module
from plans.errors import SourceError

__all__ = ["ImportIndex", "find_affected", "find_dependents", "find_framework", "is_compared", "mentions_plans"]

_DOTS = re.compile(rb"from[ \t]*\.+[ \t]+import\b")
_MODELS = "models"
_WHOLE_FILES = ("configuration_", "__init__")


def is_compared(path: Path) -> bool:
    """Return whether a file's plans are compared: those of every file that `check` would find."""
    return not is_skipped(path)


def mentions_plans(source: SourceFile | None) -> bool:
    """Return whether a file can write plans itself."""
    return source is not None and b"_plan" in source.data


def find_framework(paths: Iterable[Path]) -> Callable[[Path], bool]:
    """Return a predicate of the framework's own files: those of a package of models and their base classes.

    A file belongs to the framework if it lies in the folder of `modeling_utils.py` and `configuration_utils.py`, but
    outside of its folder `models`.

    Args:
        paths: every file of a revision.
    """
    known = set(paths)
    roots = [path.parent for path in known if all(path.parent / name in known for name in FRAMEWORK_FILES)]
    roots = [root for root in dict.fromkeys(roots) if any(path.is_relative_to(root / _MODELS) for path in known)]

    def is_framework(path: Path) -> bool:
        return any(path.is_relative_to(root) and not path.is_relative_to(root / _MODELS) for root in roots)

    return is_framework


@dataclass
class ImportIndex:
    """What the files of a revision import from each other and inherit; nothing is parsed.

    Args:
        paths: the files.
        source_of: returns them.
    """

    paths: Iterable[Path]
    source_of: SourceLookup
    _importers: dict[Path, list[tuple[Path, ImportStatement]]] = field(default_factory=dict)
    _base_words: dict[Path, frozenset[str]] = field(default_factory=dict)

    def find_importers(self, path: Path) -> list[tuple[Path, ImportStatement]]:
        """Return the imports of other files that may lead to a file."""
        if path not in self._importers:
            words = {path.stem, path.parent.name} if path.name.startswith(_WHOLE_FILES) else {path.stem}
            candidates = {id(one[1]): one for word in words for one in self._by_word.get(word, ())}
            found = [
                (importer, statement)
                for importer, statement in candidates.values()
                if importer != path
                and any(path in list_module_files(importer, statement.level, module) for module in statement.modules)
            ]
            if path.stem == "__init__":
                found += self._by_package.get(path.parent, ())
            self._importers[path] = found
        return self._importers[path]

    def find_base_words(self, path: Path) -> frozenset[str]:
        """Return the words that may name the bases of a file's classes, aliases included."""
        if path not in self._base_words:
            lines = self._read_lines(path)
            words = {word for header in scan_classes(lines, nested=True) for word in header.words}
            words |= {name.partition(".")[0] for alias, name in scan_aliases(lines) if alias in words}
            self._base_words[path] = frozenset(words)
        return self._base_words[path]

    @cached_property
    def _by_word(self) -> Mapping[str, list[tuple[Path, ImportStatement]]]:
        """The imports by each word that may be a module's last one."""
        index: dict[str, list[tuple[Path, ImportStatement]]] = defaultdict(list)
        known = {name for path in self.paths for name in (path.stem, path.parent.name)}
        for path in self.paths:
            for statement in scan_imports(self._read_lines(path)):
                words = {statement.module.rpartition(".")[2], *(name for name, _ in statement.names)}
                for word in words & known:
                    index[word].append((path, statement))
        return index

    @cached_property
    def _by_package(self) -> Mapping[Path, list[tuple[Path, ImportStatement]]]:
        """The imports `from . import name` by the folder that their dots stand for."""
        index: dict[Path, list[tuple[Path, ImportStatement]]] = defaultdict(list)
        for path in self.paths:
            source = self.source_of(path)
            for statement in scan_imports(self._read_lines(path)) if source and _DOTS.search(source.data) else ():
                if statement.level and not statement.module:
                    for folder in path.parents[statement.level - 1 : statement.level]:
                        index[folder].append((path, statement))
        return index

    def _read_lines(self, path: Path) -> bytes:
        source = self.source_of(path)
        return b"\n" + source.data if source else b"\n"


def find_dependents(changed: Iterable[Path], index: ImportIndex) -> frozenset[Path]:
    """Return the changed files, and those whose classes inherit from theirs, however indirectly.

    A file counts if a name that it imports, or an alias of one, stands among its classes' bases; a name that one file
    imports may be imported from there by others.
    """
    dependents = set(changed)
    waiting: list[tuple[Path, str | None]] = [(path, None) for path in dependents]  # the file, and the name; None: any
    passed: set[tuple[Path, str | None]] = set(waiting)
    while waiting:
        path, name = waiting.pop()
        for importer, statement in index.find_importers(path):
            if importer in dependents:
                continue
            bound = set(_list_bound_names(statement, path, name))
            words = index.find_base_words(importer)
            new: set[tuple[Path, str | None]]
            if not words.isdisjoint(bound) or (words and "*" in bound):
                dependents.add(importer)
                new = {(importer, None)}
            else:
                new = {(importer, None if one == "*" else one) for one in bound}
            waiting += new - passed
            passed |= new
    return frozenset(dependents)


def _list_bound_names(statement: ImportStatement, path: Path, name: str | None) -> Iterator[str]:
    """Yield the names that an import of a file binds, all of them or what leads to one name there."""
    if not statement.listed:
        yield statement.alias or statement.module.partition(".")[0]
        return
    for imported, bound in statement.names:
        if imported == "*":
            yield name or "*"
        elif name is None or imported in (name, path.stem, path.parent.name):
            yield bound


def find_affected(
    indexes: Iterable[ImportIndex],
    plans: Iterable[EffectivePlans],
    changed: frozenset[Path],
    significant: Iterable[Path],
) -> frozenset[Path]:
    """Return the files whose plans, or whose parameters' placements, may differ between two revisions.

    Args:
        indexes: the imports of both revisions.
        plans: the plans of both revisions.
        changed: the files that differ.
        significant: those of them that differ in more than comments and layout.
    """
    indexes, plans = list(indexes), list(plans)
    is_framework = [one.is_framework for one in plans]
    models = (path for path in changed if file_kind(path) == "modeling")
    remodelled = {path.parent for path in models if not any(is_own(path) for is_own in is_framework)}
    paths = {path for index in indexes for path in index.paths}
    affected = {path for path in paths if path in changed or path.parent in remodelled}
    significant = frozenset(significant)
    passing = {path for path in significant if not _is_framework_body(path, plans)}
    for index, one in zip(indexes, plans, strict=True):
        builders = _find_builders(index, one) if significant else {}
        reached = find_dependents(passing, index)
        while (
            more := {path for path, files in builders.items() if not files.isdisjoint(reached | significant)} - reached
        ):
            reached = find_dependents(reached | more, index)
        affected |= reached
    return frozenset(affected)


def _is_framework_body(path: Path, plans: list[EffectivePlans]) -> bool:
    """Return whether a changed file is the framework's, and its classes have the bases and the plans that they had."""
    if not any(one.is_framework(path) for one in plans):
        return False
    try:
        modules = [one.graph.module(path) for one in plans]
    except SourceError:
        return False
    before, after = (_describe_bodies(module) if module else None for module in modules)
    return before == after or before is None


def _describe_bodies(module: Module) -> Mapping[str, tuple[object, ...]]:
    return {
        name: (owner.bases, {attribute: getattr(plan, "plan", None) for attribute, plan in owner.plans.items()})
        for name, owner in module.classes.items()
        if name
    }


def _find_builders(index: ImportIndex, plans: EffectivePlans) -> dict[Path, frozenset[Path]]:
    """Return the files whose plans take entries from other files, with these; those that cannot be parsed with all."""
    builders: dict[Path, frozenset[Path]] = {}
    for path in index.paths:
        if mentions_plans(index.source_of(path)):
            try:
                files = plans.lookup.find_plan_dependencies(path)
            except SourceError:
                continue  # if it changed, comparing it says so
            if files:
                builders[path] = files
    return builders
