"""Files whose plans may take entries from others' constants and classes, found by their imports."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from codemods.files.sources import Source
from codemods.inheritance.imports import module_files
from codemods.inheritance.lineage import Lineages, SourceOf
from codemods.inheritance.lookup import Lookup
from plans.errors import SourceError

__all__ = ["importers", "may_build_plans", "takers"]

_IMPORT = re.compile(rb"^[ \t]*from[ \t]+(\.*)(\w[\w.]*)?[ \t]+import[ \t]+(\([^)]*\)|[^\n]+)", re.MULTILINE)
_MODULE_IMPORT = re.compile(rb"^[ \t]*import[ \t]+(\w[\w.]*)", re.MULTILINE)
_NAME = re.compile(rb"\w+")
_QUOTED = re.compile(rb"[\"'](\w+)[\"']")


def may_build_plans(source: Source, styles: frozenset[str]) -> bool:
    """Say whether a file mentions plans or a style, so that others' plans may be made of what it defines."""
    return b"_plan" in source.data or any(word.decode() in styles for word in _QUOTED.findall(source.data))


def importers(wanted: Collection[Path], files: Iterable[Path], source_of: SourceOf) -> frozenset[Path]:
    """Return those of `files` whose imports may lead to a wanted file; nothing is parsed for it."""
    sources = filter(None, map(source_of, files))
    return frozenset(
        source.path for source in sources if any(file in wanted for file in _imports(source.data, source.path))
    )


def takers(wanted: Collection[Path], files: Iterable[Path], source_of: SourceOf) -> frozenset[Path]:
    """Return those of `files` whose plans take over what a wanted file defines, and those that do not parse."""
    mentioning = [path for path in files if (source := source_of(path)) and b"_plan" in source.data]
    lookup = Lookup(Lineages(source_of))
    return frozenset(path for path in importers(wanted, mentioning, source_of) if _takes(path, wanted, lookup))


def _takes(path: Path, wanted: Collection[Path], lookup: Lookup) -> bool:
    try:
        return not lookup.plan_files(path).isdisjoint(wanted)
    except SourceError:
        return True


def _imports(data: bytes, path: Path) -> Iterator[Path]:
    """Yield the files that a file's imports may lead to."""
    for dots, package, listed in _IMPORT.findall(data):
        below = [b".".join(filter(None, [package, name])) for name in _NAME.findall(listed)]
        for module in filter(None, [package, *below]):
            yield from module_files(path, len(dots), module.decode())
    for module in _MODULE_IMPORT.findall(data):
        yield from module_files(path, 0, module.decode())
