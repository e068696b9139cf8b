"""Which files' plans a change may affect: those of classes that inherit, and those built from what others define."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from codemods.files.headers import ImportStatement, scan_aliases, scan_classes, scan_imports
from codemods.files.revisions import Snapshot
from codemods.files.sources import SourceFile
from codemods.inheritance.effective import file_kind
from codemods.inheritance.lookup import FileGraph, NameLookup, SourceLookup, list_module_files
from plans.errors import SourceError

__all__ = ["can_build_plans", "find_affected", "find_dependents", "find_importers", "find_plan_importers"]

_QUOTED = re.compile(rb"[\"'](\w+)[\"']")
_NOT_IMPORTED = re.compile(r"(modular|test)_")
_MODELS = "models"


def find_affected(
    before: Snapshot, after: Snapshot, changed: frozenset[Path], styles: frozenset[str], *, everything: bool
) -> frozenset[Path]:
    """Return the model files whose plans, or whose parameters' placements, may differ between two revisions.

    Args:
        before: the first revision.
        after: the second revision.
        changed: the files that differ.
        styles: every style of both revisions' dialects.
        everything: whether the revisions use different dialects, so that every model is affected.
    """
    kinds = {path: kind for path in before.blobs.keys() | after.blobs.keys() if (kind := file_kind(path))}
    if everything:
        return frozenset(kinds)
    models = [path for path in changed if path in kinds]
    remodelled = {path.parent for path in models if kinds[path] == "modeling"}
    affected = {path for path in kinds if path.parent in remodelled}
    for snapshot in (before, after):
        helpers = _find_helpers(snapshot, changed - kinds.keys(), styles)
        reached = set(kinds.values()) if helpers else {kinds[path] for path in models}
        candidates = [path for path, kind in kinds.items() if kind in reached]
        snapshot.prefetch(candidates)
        affected |= _expand_dependents({*models, *helpers}, candidates, snapshot)
    return frozenset(affected & kinds.keys())


def find_dependents(changed: Iterable[Path], files: Iterable[Path], source_of: SourceLookup) -> frozenset[Path]:
    """Return the changed files, and those among `files` whose classes inherit from theirs, however indirectly.

    Nothing is parsed: a file counts if a name that it imports, or an alias of one, stands among its classes' bases.
    """
    children: dict[Path, list[Path]] = defaultdict(list)
    for source in filter(None, map(source_of, files)):
        for imported in _find_base_files(source):
            children[imported].append(source.path)
    dependents = set(changed)
    waiting = list(dependents)
    while waiting:
        new = set(children[waiting.pop()]) - dependents
        dependents |= new
        waiting += new
    return frozenset(dependents)


def _find_base_files(source: SourceFile) -> Iterator[Path]:
    """Yield the files that a file may import base classes from."""
    lines = b"\n" + source.data
    words = {word for header in scan_classes(lines, nested=True) for word in header.words}
    words |= {name.partition(".")[0] for alias, name in scan_aliases(lines) if alias in words}
    for statement, file in _iter_imported_files(lines, source.path):
        if statement.level or _MODELS in statement.module.split("."):
            bound = [name for _, name in statement.names] or [statement.alias or statement.module.partition(".")[0]]
            if "*" in bound or not words.isdisjoint(bound):
                yield file


def can_build_plans(source: SourceFile, styles: frozenset[str]) -> bool:
    """Return whether a file mentions plans or a style, so that other files may build plans from what it defines."""
    return b"_plan" in source.data or any(word.decode() in styles for word in _QUOTED.findall(source.data))


def find_importers(wanted: Collection[Path], files: Iterable[Path], source_of: SourceLookup) -> frozenset[Path]:
    """Return those of `files` whose imports may lead to a wanted file; nothing is parsed."""
    sources = filter(None, map(source_of, files))
    return frozenset(
        source.path
        for source in sources
        if any(file in wanted for _, file in _iter_imported_files(b"\n" + source.data, source.path))
    )


def find_plan_importers(wanted: Collection[Path], files: Iterable[Path], source_of: SourceLookup) -> frozenset[Path]:
    """Return those of `files` whose plans use what a wanted file defines, and those that cannot be parsed."""
    mentioning = [path for path in files if (source := source_of(path)) and b"_plan" in source.data]
    lookup = NameLookup(FileGraph(source_of))
    return frozenset(
        path for path in find_importers(wanted, mentioning, source_of) if _uses_definitions(path, wanted, lookup)
    )


def _uses_definitions(path: Path, wanted: Collection[Path], lookup: NameLookup) -> bool:
    try:
        return not lookup.find_plan_dependencies(path).isdisjoint(wanted)
    except SourceError:
        return True


def _iter_imported_files(lines: bytes, path: Path) -> Iterator[tuple[ImportStatement, Path]]:
    """Yield the files that a file's imports may lead to, whether they exist or not."""
    for statement in scan_imports(lines):
        for module in statement.modules:
            for file in list_module_files(path, statement.level, module):
                yield statement, file


def _find_helpers(snapshot: Snapshot, changed: Iterable[Path], styles: frozenset[str]) -> frozenset[Path]:
    """Return the changed non-model files that plans may be built from, and their siblings that import those."""
    sources = (snapshot.source(path) for path in changed if not _NOT_IMPORTED.match(path.name))
    helpers = frozenset(source.path for source in sources if source and can_build_plans(source, styles))
    folders = {path.parent for path in helpers}
    siblings = [path for path in snapshot.blobs if path.parent in folders and not file_kind(path)]
    snapshot.prefetch(siblings)
    return _expand_importers(helpers, siblings, snapshot)


def _expand_dependents(changed: Iterable[Path], candidates: list[Path], snapshot: Snapshot) -> frozenset[Path]:
    """Return files with those whose plans depend on theirs, by inheritance or import, however indirectly."""
    affected = find_dependents(changed, candidates, snapshot.source)
    while more := find_plan_importers(affected, [path for path in candidates if path not in affected], snapshot.source):
        affected = find_dependents(affected | more, candidates, snapshot.source)
    return affected


def _expand_importers(files: frozenset[Path], candidates: list[Path], snapshot: Snapshot) -> frozenset[Path]:
    """Return files with those that import from them, however indirectly."""
    while more := find_importers(files, [path for path in candidates if path not in files], snapshot.source):
        files |= more
    return files
