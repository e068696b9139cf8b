"""Files whose classes inherit from others', found by the text of imports and of class headers alone."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

from codemods.files.sources import SourceFile
from codemods.inheritance.imports import list_module_files
from codemods.inheritance.lineage import SourceLookup

__all__ = ["find_dependents"]

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
