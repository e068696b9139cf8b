"""The class graph of a revision's files: an import at any depth leads to any of them, re-exports included."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from codemods.files.headers import scan_imports
from codemods.files.sources import SourceFile
from codemods.inheritance.class_graph import ClassGraph, ClassKey, ImportTarget, split_import
from codemods.inheritance.parsed_files import ParsedFiles
from codemods.reading.module import Import, Module
from plans.errors import SourceError

__all__ = ["FileGraph", "SourceLookup", "list_module_files"]

SourceLookup = Callable[[Path], SourceFile | None]
"""From a path to its file, None if there is none."""


@dataclass
class FileGraph(ClassGraph):
    """The classes of files that need not be on disk, each read at most once; an import leads to any of them.

    Args:
        source_of: returns the files.
        files: what was parsed of them so far, and of other revisions.
    """

    source_of: SourceLookup
    files: ParsedFiles = field(default_factory=ParsedFiles)
    _modules: dict[Path, Module | None] = field(default_factory=dict)
    _imports: dict[Path, Mapping[str, Sequence[Import]]] = field(default_factory=dict)

    def source(self, path: Path) -> SourceFile | None:
        """Return a file, None if there is none."""
        return self.source_of(path)

    def module(self, path: Path) -> Module | None:
        """Return what a file says about plans, None if there is no such file.

        Raises:
            SourceError: the file's plans have an unusual form, and it cannot be parsed.
        """
        if path not in self._modules:
            source = self.source(path)
            self._modules[path] = self.files.read_module(source) if source else None
        return self._modules[path]

    def follow_import(self, path: Path, name: str) -> Iterator[ClassKey]:
        """Yield the classes that a dotted name may stand for which a file imports, one for each import of the name."""
        return iter(self._find_classes(path, name, frozenset()))

    def list_import_targets(self, path: Path, name: str) -> Iterator[list[ClassKey]]:
        """Yield, for each import of a dotted name in a file, the files and names there that it may lead to."""
        imports = self._list_imports(path)
        parts = name.split(".")
        for size in range(len(parts), 0, -1):
            if statements := imports.get(".".join(parts[:size])):
                for statement in statements:
                    yield self._list_files(path, split_import(statement, parts[size:]))
                return
        if len(parts) > 1:
            yield self._list_files(path, split_import(Import(0, "", ""), parts))
        else:
            for everything in imports.get("*", ()):
                yield self._list_files(path, [ImportTarget(everything.level, everything.module, name)])

    def list_imported_names(self, path: Path) -> Iterable[str]:
        """Return the names that a file's imports bind, at any depth."""
        return self._list_imports(path).keys()

    def _find_classes(self, path: Path, name: str, visited: frozenset[ClassKey]) -> dict[ClassKey, None]:
        """Return the classes that a name stands for, passed on by any number of files."""
        found: dict[ClassKey, None] = {}
        for targets in self.list_import_targets(path, name):
            for target in targets:
                if target in visited or (module := self.module(target[0])) is None:
                    continue
                defined = target[1] in module.classes
                classes = {target: None} if defined else self._find_classes(*target, visited | {target})
                if classes:
                    found |= classes
                    break
        return found

    def _list_files(self, path: Path, targets: Iterable[ImportTarget]) -> list[ClassKey]:
        return [
            (file, target.name)
            for target in targets
            for file in list_module_files(path, target.level, target.module)
            if self.source(file) is not None
        ]

    def _list_imports(self, path: Path) -> Mapping[str, Sequence[Import]]:
        """Return what imports at any depth bind each name to: several things in `try` and `except`."""
        if path not in self._imports:
            source = self.source(path)
            imports = _scan_names(source.data) if source else {}
            if source and any(len(statements) > 1 for statements in imports.values()):
                imports = self._parse_names(source)  # some may stand in a string
            self._imports[path] = imports
        return self._imports[path]

    def _parse_names(self, source: SourceFile) -> Mapping[str, Sequence[Import]]:
        try:
            return _collect_names(self.files.parse(source))
        except SourceError:
            return _scan_names(source.data)


def _scan_names(data: bytes) -> Mapping[str, Sequence[Import]]:
    names: dict[str, dict[Import, None]] = defaultdict(dict)
    for statement in scan_imports(b"\n" + data):
        if statement.listed:
            for name, bound in statement.names:
                names[bound][Import(statement.level, statement.module, name)] = None
        elif statement.alias:
            names[statement.alias][Import(0, statement.module, "")] = None
    return {name: tuple(statements) for name, statements in names.items()}


def _collect_names(statements: Sequence[ast.stmt]) -> Mapping[str, Sequence[Import]]:
    names: dict[str, dict[Import, None]] = defaultdict(dict)
    for node in (node for statement in statements for node in ast.walk(statement)):
        match node:
            case ast.ImportFrom(module=module, names=aliases, level=level):
                for alias in aliases:
                    names[alias.asname or alias.name][Import(level, module or "", alias.name)] = None
            case ast.Import(names=aliases):
                for alias in aliases:
                    if alias.asname:
                        names[alias.asname][Import(0, alias.name, "")] = None
    return {name: tuple(statements) for name, statements in names.items()}


@cache
def list_module_files(path: Path, level: int, module: str) -> tuple[Path, ...]:
    """Return the files that an import may load: a module, a model package's configuration, or what a package passes on.

    Args:
        path: the importing file.
        level: the number of leading dots; for an absolute import, the package may be in any folder above the file.
        module: the module after the dots.
    """
    bases = path.parents[level - 1 : level] if level else path.parents
    targets = [target for base in bases if (target := base.joinpath(*module.split("."))).name]
    return tuple(
        file
        for target in targets
        for file in (
            target.with_suffix(".py"),
            target / f"configuration_{target.name}.py",
            target / "__init__.py",
        )
    )
