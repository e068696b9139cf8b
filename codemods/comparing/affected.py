"""Which files' plans a change may affect: those of classes that inherit, and those built from what others define."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from codemods.files.headers import ImportStatement, scan_aliases, scan_classes, scan_imports
from codemods.files.revisions import Snapshot
from codemods.files.sources import SourceFile, is_skipped
from codemods.inheritance.effective import EffectivePlans, file_kind
from codemods.inheritance.file_graph import SourceLookup
from codemods.models.framework import FRAMEWORK_FILES, define_base_classes
from codemods.reading.module import Module
from plans.errors import SourceError

__all__ = [
    "ImportIndex",
    "find_affected",
    "find_dependents",
    "find_framework",
    "is_compared",
    "mentions_plans",
    "scan_imported_names",
]

_TOP = Path()
_MODELS = "models"


def is_compared(path: Path) -> bool:
    """Return whether a file's plans are compared: those of every file that `check` would find."""
    return not is_skipped(path)


def mentions_plans(source: SourceFile | None) -> bool:
    """Return whether a file can write plans itself."""
    return source is not None and b"_plan" in source.data


def find_framework(snapshots: Iterable[Snapshot]) -> Callable[[Path], bool]:
    """Return a predicate of the framework's own files: those of a package of models and their base classes.

    A file belongs to the framework if it lies in the folder of `modeling_utils.py` and `configuration_utils.py`, but
    outside of its folder `models`. Where the files have other names, the folder is that of the files that define the
    base classes. It is the framework's in all revisions if it is so in one.

    Args:
        snapshots: the revisions.
    """
    snapshots = tuple(snapshots)
    known = {path for snapshot in snapshots for path in snapshot.blobs}
    packages = {parent.parent for path in known for parent in path.parents if parent.name == _MODELS}
    roots = [root for root in packages if all(root / name in known for name in FRAMEWORK_FILES)]
    if not roots:
        roots = [root for root in packages if any(_has_base_classes(root, snapshot) for snapshot in snapshots)]

    def is_framework(path: Path) -> bool:
        return any(path.is_relative_to(root) and not path.is_relative_to(root / _MODELS) for root in roots)

    return is_framework


def _has_base_classes(folder: Path, snapshot: Snapshot) -> bool:
    paths = [path for path in snapshot.blobs if path.parent == folder and is_compared(path)]
    snapshot.prefetch(paths)
    return define_base_classes(source.data for path in paths if (source := snapshot.source(path)))


Names = tuple[tuple[str, str], ...]
"""Imported names, each with the name that it is bound to."""

ImportScan = Callable[[bytes], Sequence[tuple[ImportStatement, Names]]]
"""From a file's bytes to its import statements, each with the names that it imports."""


def scan_imported_names(data: bytes) -> Sequence[tuple[ImportStatement, Names]]:
    """Return the import statements in a file's bytes, each with the names that it imports."""
    return [(statement, statement.names) for statement in scan_imports(b"\n" + data)]


class _FileImport(NamedTuple):
    """An import statement of one module.

    Args:
        path: the importing file.
        names: each imported name with the name that it is bound to; empty if the module itself is imported.
        bound: the name that the module is bound to in that case.
    """

    path: Path
    names: Names
    bound: str


_WHOLE_MODULE = ""
_EVERY_NAME = "*"
_ModuleImport = tuple[Path, str]
"""A file that imports a name from a module, or the module itself, and the name that it is bound to there."""


@dataclass
class ImportIndex:
    """What the files of a revision import from each other and inherit; nothing is parsed.

    Args:
        paths: the files.
        source_of: returns them.
        scan: returns a file's imports; one that remembers them serves two revisions.
    """

    paths: Iterable[Path]
    source_of: SourceLookup
    scan: ImportScan = scan_imported_names
    _importers: dict[Path, Mapping[str, list[_ModuleImport]]] = field(default_factory=dict)
    _base_words: dict[Path, frozenset[str]] = field(default_factory=dict)

    def find_importers(self, path: Path, name: str | None) -> Iterator[_ModuleImport]:
        """Yield the files that import a name from a file or the file as a whole, and what that is bound to there.

        Args:
            path: the file.
            name: the name; None stands for any.
        """
        if path not in self._importers:
            self._importers[path] = self._index_importers(path)
        importers = self._importers[path]
        if name is None:
            for found in importers.values():
                yield from found
            return
        yield from importers.get(name, ())
        yield from importers.get(_WHOLE_MODULE, ())
        yield from ((importer, name) for importer, _ in importers.get(_EVERY_NAME, ()))

    def find_base_words(self, path: Path) -> frozenset[str]:
        """Return the words that may name the bases of a file's classes, aliases included."""
        if path not in self._base_words:
            source = self.source_of(path)
            lines = b"\n" + source.data if source else b"\n"
            words = {word for header in scan_classes(lines, nested=True) for word in header.words}
            words |= {name.partition(".")[0] for alias, name in scan_aliases(lines) if alias in words}
            self._base_words[path] = frozenset(words)
        return self._base_words[path]

    def _index_importers(self, path: Path) -> Mapping[str, list[_ModuleImport]]:
        """Return what imports a file, by the imported name."""
        index: dict[str, list[_ModuleImport]] = defaultdict(list)
        for statement in dict.fromkeys(self._find_imports(path)):
            if statement.path == path:
                continue
            for name, bound in statement.names or ((_WHOLE_MODULE, statement.bound),):
                index[name].append((statement.path, bound))
        return index

    def _find_imports(self, path: Path) -> Iterator[_FileImport]:
        """Yield the imports of other files that may lead to a file."""
        module = path.with_suffix("")
        is_package = path.name in ("__init__.py", f"configuration_{path.parent.name}.py")
        for target in (module, path.parent) if is_package else (module,):
            text = _format_folder(target)
            yield from self._relative.get(text, ())
            for start in (0, *(match.end() for match in re.finditer("/", text))):
                prefix = text[:start]
                for statement in self._absolute.get(text[start:], ()):
                    if statement.path.as_posix().startswith(prefix):
                        yield statement

    @property
    def _relative(self) -> Mapping[str, list[_FileImport]]:
        """The imports with leading dots, by the module that they lead to as a path from the top folder."""
        return self._imports[0]

    @property
    def _absolute(self) -> Mapping[str, list[_FileImport]]:
        """The other imports, by the module as a path from a folder above the importing file."""
        return self._imports[1]

    @cached_property
    def _imports(self) -> tuple[Mapping[str, list[_FileImport]], Mapping[str, list[_FileImport]]]:
        relative: dict[str, list[_FileImport]] = defaultdict(list)
        absolute: dict[str, list[_FileImport]] = defaultdict(list)
        modules = {name for path in self.paths for name in (path.stem, path.parent.name)}
        for path in self.paths:
            source = self.source_of(path)
            folders = [_format_folder(folder) for folder in path.parents]
            for statement, names in self.scan(source.data) if source else ():
                if statement.level > len(folders):
                    continue
                index = relative if statement.level else absolute
                folder = folders[statement.level - 1] if statement.level else ""
                parts = [part for part in (folder, statement.module.replace(".", "/")) if part]
                bound = statement.alias or statement.module.partition(".")[0]
                index["/".join(parts)].append(_FileImport(path, names, bound))
                for name, bound in names:
                    if name in modules:
                        index["/".join((*parts, name))].append(_FileImport(path, (), bound))
        return relative, absolute


def _format_folder(path: Path) -> str:
    """Return a path from the top folder as text, empty for the top folder itself."""
    return "" if path == _TOP else path.as_posix()


def find_dependents(changed: Iterable[Path], index: ImportIndex) -> frozenset[Path]:
    """Return the changed files, and those whose classes inherit from theirs, however indirectly.

    A file counts if a name that it imports, or an alias of one, stands among its classes' bases; a name that one file
    imports may be imported from there by others.
    """
    dependents = set(changed)
    waiting: list[tuple[Path, str | None]] = [(path, None) for path in dependents]  # the file, and the name; None: any
    passed: set[tuple[Path, str | None]] = set(waiting)
    while waiting:
        for importer, bound in index.find_importers(*waiting.pop()):
            if importer in dependents:
                continue
            words = index.find_base_words(importer)
            step: tuple[Path, str | None] = importer, None if bound == _EVERY_NAME else bound
            if bound in words or (words and bound == _EVERY_NAME):
                dependents.add(importer)
                step = importer, None
            if step not in passed:
                passed.add(step)
                waiting.append(step)
    return frozenset(dependents)


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
