"""Which files' plans a change may reach: those of classes that inherit, and those made of what others define."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from codemods.files.revisions import Snapshot
from codemods.files.sources import SourceFile
from codemods.inheritance.class_graph import ClassGraph, SourceLookup
from codemods.inheritance.effective import file_kind
from codemods.inheritance.imports import list_module_files
from codemods.inheritance.lookup import NameLookup
from plans.errors import SourceError

__all__ = ["can_build_plans", "find_affected", "find_dependents", "find_importers", "find_plan_importers"]


_CLASS_HEADER = re.compile(rb"^[ \t]*class[ \t]+\w+[ \t]*\(([^)]*)\)", re.MULTILINE)
_BASE_IMPORT = re.compile(
    rb"^[ \t]*from[ \t]+(\.+|(?=[\w.]*\bmodels\b))(\w[\w.]*)?[ \t]+import[ \t]+(\([^)]*\)|[^\n]+)", re.MULTILINE
)
_MODEL_MODULE = re.compile(rb"configuration_|modeling_")
_BASE_MODULE_IMPORT = re.compile(rb"^[ \t]*import[ \t]+(\w[\w.]*\.models\.[\w.]+)([^\n]*)", re.MULTILINE)
_NAME = re.compile(rb"\w+")


def find_dependents(changed: Iterable[Path], files: Iterable[Path], get_source: SourceLookup) -> frozenset[Path]:
    """Return the changed files, and those among `files` whose classes inherit from theirs, however indirectly.

    Nothing is parsed for it: a file counts where a name that it imports stands among its classes' bases.
    """
    importers: dict[Path, list[tuple[SourceFile, frozenset[bytes]]]] = defaultdict(list)
    for source in filter(None, map(get_source, files)):
        for imported, names in _find_base_imports(source):
            importers[imported].append((source, names))
    found = set(changed)
    waiting = list(found)
    while waiting:
        children = importers[waiting.pop()]
        new = {source.path for source, names in children if source.path not in found and _is_base(source, names)}
        found |= new
        waiting += new
    return frozenset(found)


def _find_base_imports(source: SourceFile) -> Iterator[tuple[Path, frozenset[bytes]]]:
    """Yield the files that a file's imports may lead to, with the names they bring in; none where that is all."""
    for dots, package, listed in _BASE_IMPORT.findall(source.data):
        names = frozenset(_NAME.findall(listed))
        below = [b".".join(filter(None, [package, name])) for name in names if not package or _MODEL_MODULE.match(name)]
        for module in filter(None, [package, *below]):
            yield from ((file, names) for file in list_module_files(source.path, len(dots), module.decode()))
    for module, alias in _BASE_MODULE_IMPORT.findall(source.data):
        names = frozenset(_NAME.findall(alias) or _NAME.findall(module))
        yield from ((file, names) for file in list_module_files(source.path, 0, module.decode()))


def _is_base(source: SourceFile, names: frozenset[bytes]) -> bool:
    return not names or any(not names.isdisjoint(_NAME.findall(bases)) for bases in _CLASS_HEADER.findall(source.data))


_IMPORT = re.compile(rb"^[ \t]*from[ \t]+(\.*)(\w[\w.]*)?[ \t]+import[ \t]+(\([^)]*\)|[^\n]+)", re.MULTILINE)
_MODULE_IMPORT = re.compile(rb"^[ \t]*import[ \t]+(\w[\w.]*)", re.MULTILINE)
_WORD = re.compile(rb"\w+")
_QUOTED = re.compile(rb"[\"'](\w+)[\"']")


def can_build_plans(source: SourceFile, styles: frozenset[str]) -> bool:
    """Say whether a file mentions plans or a style, so that others' plans may be made of what it defines."""
    return b"_plan" in source.data or any(word.decode() in styles for word in _QUOTED.findall(source.data))


def find_importers(wanted: Collection[Path], files: Iterable[Path], get_source: SourceLookup) -> frozenset[Path]:
    """Return those of `files` whose imports may lead to a wanted file; nothing is parsed for it."""
    sources = filter(None, map(get_source, files))
    return frozenset(
        source.path
        for source in sources
        if any(file in wanted for file in _list_imported_files(source.data, source.path))
    )


def find_plan_importers(wanted: Collection[Path], files: Iterable[Path], get_source: SourceLookup) -> frozenset[Path]:
    """Return those of `files` whose plans take over what a wanted file defines, and those that do not parse."""
    mentioning = [path for path in files if (source := get_source(path)) and b"_plan" in source.data]
    lookup = NameLookup(ClassGraph(get_source))
    return frozenset(
        path for path in find_importers(wanted, mentioning, get_source) if _uses_definitions(path, wanted, lookup)
    )


def _uses_definitions(path: Path, wanted: Collection[Path], lookup: NameLookup) -> bool:
    try:
        return not lookup.find_plan_dependencies(path).isdisjoint(wanted)
    except SourceError:
        return True


def _list_imported_files(data: bytes, path: Path) -> Iterator[Path]:
    """Yield the files that a file's imports may lead to."""
    for dots, package, listed in _IMPORT.findall(data):
        below = [b".".join(filter(None, [package, name])) for name in _WORD.findall(listed)]
        for module in filter(None, [package, *below]):
            yield from list_module_files(path, len(dots), module.decode())
    for module in _MODULE_IMPORT.findall(data):
        yield from list_module_files(path, 0, module.decode())


_NOT_IMPORTED = re.compile(r"(modular|test)_")


def find_affected(
    before: Snapshot, after: Snapshot, changed: frozenset[Path], styles: frozenset[str], *, everything: bool
) -> frozenset[Path]:
    """Return the model files whose plans may differ, or whose models read them differently.

    Args:
        before: the first revision.
        after: the second.
        changed: the files that differ.
        styles: every style of both revisions' dialects.
        everything: whether the revisions speak different dialects.
    """
    kinds = {path: kind for path in before.blobs.keys() | after.blobs.keys() if (kind := file_kind(path))}
    if everything:
        return frozenset(kinds)
    models = [path for path in changed if path in kinds]
    remodelled = {path.parent for path in models if kinds[path] == "modeling"}
    found = {path for path in kinds if path.parent in remodelled}
    for snapshot in (before, after):
        helpers = _find_helpers(snapshot, changed - kinds.keys(), styles)
        reached = set(kinds.values()) if helpers else {kinds[path] for path in models}
        candidates = [path for path, kind in kinds.items() if kind in reached]
        snapshot.prefetch(candidates)
        found |= _expand_dependents({*models, *helpers}, candidates, snapshot)
    return frozenset(found & kinds.keys())


def _find_helpers(snapshot: Snapshot, changed: Iterable[Path], styles: frozenset[str]) -> frozenset[Path]:
    """Return the changed files besides the models' that plans may be made from, and what beside them imports those."""
    sources = (snapshot.source(path) for path in changed if not _NOT_IMPORTED.match(path.name))
    found = frozenset(source.path for source in sources if source and can_build_plans(source, styles))
    folders = {path.parent for path in found}
    beside = [path for path in snapshot.blobs if path.parent in folders and not file_kind(path)]
    snapshot.prefetch(beside)
    return _expand_importers(found, beside, snapshot)


def _expand_dependents(changed: Iterable[Path], candidates: list[Path], snapshot: Snapshot) -> frozenset[Path]:
    found = find_dependents(changed, candidates, snapshot.source)
    while more := find_plan_importers(found, [path for path in candidates if path not in found], snapshot.source):
        found = find_dependents(found | more, candidates, snapshot.source)
    return found


def _expand_importers(files: frozenset[Path], candidates: list[Path], snapshot: Snapshot) -> frozenset[Path]:
    """Return files with those that import from them, however indirectly."""
    while more := find_importers(files, [path for path in candidates if path not in files], snapshot.source):
        files |= more
    return files
