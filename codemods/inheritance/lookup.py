"""Names looked up across the files of a revision: the constant a name stands for, what an expression depends on."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from hashlib import sha256
from pathlib import Path

from codemods.files.sources import SourceFile
from codemods.inheritance.class_graph import ClassGraph, ClassKey, resolve_import
from codemods.reading.entries import PlanEntry
from codemods.reading.module import ClassPlans, Module, PlanLiteral, Reference, iter_literals
from codemods.reading.names import NameResolver, get_dotted_name, parse_expression
from codemods.reading.parse import read_module
from codemods.reading.plan_literals import AssignmentTarget, read_assignment
from codemods.reading.scope import Scope

__all__ = ["Constant", "FileGraph", "NameLookup", "SourceLookup", "list_module_files"]

SourceLookup = Callable[[Path], SourceFile | None]
"""From a path to its file, None if there is none."""


@dataclass
class FileGraph(ClassGraph):
    """The classes of files that need not be on disk, each parsed at most once; an import leads to any of them.

    Args:
        source_of: returns the files.
    """

    source_of: SourceLookup
    _modules: dict[Path, Module | None] = field(default_factory=dict)

    def source(self, path: Path) -> SourceFile | None:
        """Return a file, None if there is none."""
        return self.source_of(path)

    def module(self, path: Path) -> Module | None:
        """Return what a file says about plans, None if there is no such file.

        Raises:
            SourceError: the file cannot be parsed.
        """
        if path not in self._modules:
            source = self.source(path)
            self._modules[path] = read_module(source) if source else None
        return self._modules[path]

    def follow_import(self, path: Path, name: str) -> Iterator[ClassKey]:
        """Yield the classes that a dotted name may stand for which a file imports, whether they exist or not."""
        module = self.module(path)
        for target in resolve_import(module, name) if module else ():
            for file in list_module_files(path, target.level, target.module):
                yield file, target.name


@dataclass(frozen=True)
class Constant:
    """The only value that a name ever has.

    Args:
        path: the file that defines the name.
        scope: the qualified name of the class that defines it, empty at the top level.
        value: the value's expression.
    """

    path: Path
    scope: str
    value: ast.expr


@dataclass
class NameLookup:
    """Looks up names in the files of a graph.

    Args:
        graph: the files.
    """

    graph: ClassGraph
    _resolvers: dict[Path, NameResolver | None] = field(default_factory=dict)

    def find_constant(self, path: Path, scope: str, name: str) -> Constant | None:
        """Return the constant that a dotted name in a class of a file stands for, None if that is not certain."""
        return next(self._search_constants(path, scope, name, frozenset()), None)

    def read_plan_uses(self, constant: Constant, attribute: str) -> Iterator[PlanLiteral | Reference]:
        """Yield the entries and references that a constant's value contributes to a plan."""
        resolver = self._get_resolver(constant.path)
        assert resolver is not None
        target = AssignmentTarget(constant.scope, attribute, Scope(constant.scope), is_assigned=True)
        for use in read_assignment(constant.value, target, resolver.source, resolver.definitions):
            if isinstance(use, (PlanLiteral, Reference)):
                yield use

    def resolve_style(self, path: Path, scope: str, entry: PlanEntry) -> tuple[str | None, str]:
        """Return an entry's style; if it is computed from more than a constant, None and its provenance."""
        if entry.style is not None:
            return entry.style, ""
        resolver = self._get_resolver(path)
        assert resolver is not None
        node = resolver.parse_span(entry.style_span)
        name = get_dotted_name(node)
        constant = self.find_constant(path, scope, name) if name else None
        match constant:
            case Constant(value=ast.Constant(value=str(style))):
                return style, ""
        return None, self.compute_provenance(path, node)

    def compute_provenance(self, path: Path, node: ast.AST) -> str:
        """Return what determines an expression's value: its text, its names' definitions, digests of their files."""
        resolver, module = self._get_resolver(path), self.graph.module(path)
        assert resolver is not None
        assert module is not None
        texts, names = resolver.collect_dependencies(node)
        sources = filter(None, map(self.graph.source, sorted(_list_imported_files(path, module, names))))
        return "\n".join([*texts, *(sha256(source.data).hexdigest() for source in sources)])

    def find_unresolved_references(self, path: Path, owner: ClassPlans) -> Iterator[Reference]:
        """Yield as references the other statements that put entries into a class's plans which cannot be read."""
        module, resolver = self.graph.module(path), self._get_resolver(path)
        assert module is not None
        assert resolver is not None
        for use in module.unresolved:
            if use.class_name != owner.name:
                continue
            function, statement = resolver.find_statement(use.line)
            lines = range(statement.lineno, (statement.end_lineno or statement.lineno) + 1)
            if not any(known.attribute == use.attribute and known.line in lines for known in owner.references):
                text = ast.unparse(statement)
                start = resolver.source.offset(statement.lineno, statement.col_offset)
                yield Reference(owner.name, use.attribute, use.line, start, text, function)

    def find_plan_dependencies(self, path: Path) -> frozenset[Path]:
        """Return the files that a file's plans may take entries or styles from.

        Raises:
            SourceError: the file cannot be parsed.
        """
        resolver, module = self._get_resolver(path), self.graph.module(path)
        if resolver is None or module is None:
            return frozenset()
        references = [
            parse_expression(reference.text)
            for owner in module.classes.values()
            for reference in (*owner.references, *self.find_unresolved_references(path, owner))
        ]
        entries = (entry for literal in iter_literals(module) for entry in literal.entries)
        styles = [resolver.parse_span(entry.style_span) for entry in entries if entry.style is None]
        names = {name for node in (*references, *styles) for name in resolver.collect_dependencies(node)[1]}
        return frozenset(_list_imported_files(path, module, names))

    def _search_constants(self, path: Path, scope: str, name: str, visited: frozenset[Path]) -> Iterator[Constant]:
        """Yield the constants that a name stands for in a file, or in the files that it imports the name from."""
        resolver, module = self._get_resolver(path), self.graph.module(path)
        if resolver is None or module is None or path in visited:
            return
        value = resolver.resolve_constant(name, scope)
        if value is not None:
            yield Constant(path, scope, value)
            return
        for target in resolve_import(module, name):
            for file in list_module_files(path, target.level, target.module):
                yield from self._search_constants(file, "", target.name, visited | {path})

    def _get_resolver(self, path: Path) -> NameResolver | None:
        if path not in self._resolvers:
            source = self.graph.source(path)
            self._resolvers[path] = NameResolver(source) if source else None
        return self._resolvers[path]


def _list_imported_files(path: Path, module: Module, names: Iterable[str]) -> set[Path]:
    """Return the files that names of a file may be imported from, whether they exist or not."""
    modules = {(target.level, target.module) for name in names for target in resolve_import(module, name)}
    return {file for level, name in modules for file in list_module_files(path, level, name)}


@cache
def list_module_files(path: Path, level: int, module: str) -> tuple[Path, ...]:
    """Return the files that an import may load: a module, or a model package's configuration, which it re-exports.

    Args:
        path: the importing file.
        level: the number of leading dots; for an absolute import, the package may be in any folder above the file.
        module: the module after the dots.
    """
    bases = path.parents[level - 1 : level] if level else path.parents
    targets = [target for base in bases if (target := base.joinpath(*module.split("."))).name]
    return tuple(
        file for target in targets for file in (target.with_suffix(".py"), target / f"configuration_{target.name}.py")
    )
