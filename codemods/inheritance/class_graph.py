"""The classes that a class inherits from, in Python's order and across files, worked out from source alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from codemods.files.sources import SourceFile
from codemods.inheritance.imports import find_local_class, list_module_files, resolve_imported_name
from codemods.reading.module import ClassPlans, Module
from codemods.reading.parse import read_module

__all__ = ["Ancestor", "ClassGraph", "SourceLookup"]

SourceLookup = Callable[[Path], SourceFile | None]
"""From a path to that file, None where there is none."""

Ancestor = tuple[Path, ClassPlans]
"""A class and its file."""


@dataclass
class ClassGraph:
    """The classes of a set of files, each parsed at most once.

    Args:
        get_source: gives the files.
    """

    get_source: SourceLookup
    _modules: dict[Path, Module | None] = field(default_factory=dict)
    _mros: dict[tuple[Path, str], tuple[Ancestor, ...]] = field(default_factory=dict)

    def module(self, path: Path) -> Module | None:
        """Return what a file says of plans, None where there is no such file."""
        if path not in self._modules:
            source = self.get_source(path)
            self._modules[path] = read_module(source) if source else None
        return self._modules[path]

    def mro(self, path: Path, class_name: str) -> tuple[Ancestor, ...]:
        """Return a class and its bases in the order in which Python looks an attribute up."""
        if (path, class_name) not in self._mros:
            self._mros[path, class_name] = ()  # where a class is its own ancestor, the circle ends here
            found = list(self._walk_ancestors(path, class_name))
            last = {(file, owner.name): (file, owner) for file, owner in reversed(found)}
            self._mros[path, class_name] = tuple(reversed(last.values()))
        return self._mros[path, class_name]

    def resolve_name(self, path: Path, class_name: str, name: str) -> tuple[Ancestor, ...]:
        """Return the lineage of what a dotted name in a class stands for, none where it is no class that is known."""
        module = self.module(path)
        if module is None:
            return ()
        local = find_local_class(module, class_name, name)
        return self.mro(path, local) if local else tuple(self._resolve_import(path, module, name))

    def clear(self) -> None:
        """Drop what was found; a search that was broken off leaves lineages that look like circles."""
        self._mros.clear()

    def _walk_ancestors(self, path: Path, class_name: str) -> Iterator[Ancestor]:
        """Yield a class, then the lineage of each base; what two bases share comes twice."""
        module = self.module(path)
        if module is None:
            return
        owner = module.classes.get(class_name)
        if owner is None:
            yield from self._resolve_import(path, module, class_name)
            return
        yield path, owner
        for base in owner.bases:
            name = find_local_class(module, class_name, base)
            yield from self.mro(path, name) if name else self._resolve_import(path, module, base)

    def _resolve_import(self, path: Path, module: Module, name: str) -> Iterator[Ancestor]:
        for meant in resolve_imported_name(module, name):
            for file in list_module_files(path, meant.level, meant.module):
                yield from self.mro(file, meant.class_name)
