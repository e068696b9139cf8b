"""Files whose plans may take entries from others' constants and classes, found by their imports."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from codemods.files.sources import SourceFile
from codemods.inheritance.imports import list_module_files
from codemods.inheritance.lineage import ClassGraph, SourceLookup
from codemods.inheritance.lookup import NameLookup
from plans.errors import SourceError

__all__ = ["can_build_plans", "find_importers", "find_plan_importers"]

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
