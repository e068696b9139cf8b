"""Provenance: the texts that determine an expression's value, in its own file and in those that it imports from.

A comment is never part of it. In a model's file every name counts that occurs in what the expression depends on, and
each file that it imports from counts as a whole. The framework's own code refers to most of itself in one way or
another; there, only what plain names stand for counts.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from codemods.inheritance.class_graph import ClassKey
from codemods.inheritance.file_graph import FileGraph
from codemods.reading.expressions import iter_bindings
from codemods.reading.names import Definitions, Function, NameResolver, get_dotted_name
from codemods.reading.scope import iter_blocks
from plans.plan import plan_kind

__all__ = ["ProvenanceTracer"]

_Trace = tuple[frozenset[str], frozenset[Path]]
"""The texts that determine a value, and the files that they are in."""


@dataclass
class ProvenanceTracer:
    """Traces expressions to what determines their values; each definition and file is read once.

    Args:
        graph: the files.
        get_resolver: returns the names of a file.
        is_framework: returns whether a file is the framework's own code.
    """

    graph: FileGraph
    get_resolver: Callable[[Path], NameResolver | None]
    is_framework: Callable[[Path], bool]
    _definitions: dict[Path, Mapping[str, Sequence[ast.stmt]]] = field(default_factory=dict)
    _texts: dict[int, str] = field(default_factory=dict)

    def trace(self, path: Path, node: ast.AST, line: int | None) -> _Trace:
        """Return the texts that determine an expression's value, and the files that they are in.

        Args:
            path: the expression's file, which exists.
            node: the expression.
            line: the expression's line if it stands in a function.
        """
        resolver = self.get_resolver(path)
        assert resolver is not None
        texts: set[str] = set()
        files: set[Path] = set()
        visited: set[ClassKey] = set()
        if line is not None and self.is_framework(path):
            function = _find_function(resolver.definitions.statements, line)
            parts = _find_local_dependencies(node, [function] if function else [])
            texts |= {ast.unparse(part) for part in parts}
            for name in {name for part in parts for name in _iter_bare_names(part)}:
                self._trace_definition(path, name, texts, files, visited)
            return frozenset(texts), frozenset(files)
        own_texts, names = resolver.collect_dependencies(node)
        texts |= set(own_texts)
        for file, name in self._list_targets(path, names):
            if self.is_framework(file):
                self._trace_definition(file, name, texts, files, visited)
            else:
                self._trace_file(file, texts, files)
        return frozenset(texts), frozenset(files)

    def _trace_file(self, path: Path, texts: set[str], files: set[Path]) -> None:
        """Add a file as a whole, and those that it imports from, except for the framework's."""
        waiting = [path]
        while waiting:
            file = waiting.pop()
            if file in files:
                continue
            files.add(file)
            source = self.graph.source(file)
            assert source is not None
            texts.add(self.graph.files.compute_digest(source))
            targets = self._list_targets(file, self.graph.list_imported_names(file))
            waiting += [target for target, _ in targets if not self.is_framework(target)]

    def _trace_definition(
        self, path: Path, name: str, texts: set[str], files: set[Path], visited: set[ClassKey]
    ) -> None:
        """Add what defines a top-level name of the framework, and what the plain names in that stand for."""
        waiting = [(path, name)]
        while waiting:
            key = waiting.pop()
            if key in visited:
                continue
            visited.add(key)
            file, name = key
            statements = self._list_definitions(file).get(name.partition(".")[0], ())
            for statement in statements:
                files.add(file)
                texts.add(self._unparse(statement))
                if not isinstance(statement, ast.ClassDef):
                    waiting += [(file, bare) for bare in _iter_bare_names(statement)]
            if not statements:
                waiting += self._list_targets(file, [name])

    def _list_targets(self, path: Path, names: Iterable[str]) -> list[ClassKey]:
        return [
            target for name in names for targets in self.graph.list_import_targets(path, name) for target in targets
        ]

    def _list_definitions(self, path: Path) -> Mapping[str, Sequence[ast.stmt]]:
        """Return the statements that bind each name at the top level of a file."""
        if path not in self._definitions:
            resolver = self.get_resolver(path)
            found: dict[str, list[ast.stmt]] = defaultdict(list)
            for name, statement in _iter_definitions(resolver.definitions.statements if resolver else ()):
                found[name].append(statement)
            self._definitions[path] = found
        return self._definitions[path]

    def _unparse(self, statement: ast.stmt) -> str:
        """Return a statement's text; the resolvers keep their nodes alive, so that their ids stay theirs."""
        if id(statement) not in self._texts:
            self._texts[id(statement)] = ast.unparse(statement)
        return self._texts[id(statement)]


def _iter_definitions(statements: Iterable[ast.stmt]) -> Iterator[tuple[str, ast.stmt]]:
    for statement in statements:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield statement.name, statement
            continue
        for target, _ in iter_bindings(statement):
            if isinstance(target, ast.Name):
                yield target.id, statement
        match statement:
            case ast.AugAssign(target=ast.Name(id=name)):
                yield name, statement
            case ast.Assign(targets=[ast.Subscript(value=ast.Name(id=name))]):
                yield name, statement
            case ast.Expr(value=ast.Call(func=ast.Attribute(value=ast.Name(id=name)))):
                yield name, statement
        for block, _ in iter_blocks(statement):
            yield from _iter_definitions(block)


def _find_function(statements: Iterable[ast.stmt], line: int) -> ast.stmt | None:
    """Return the outermost function around a line."""
    for statement in statements:
        if statement.lineno <= line <= (statement.end_lineno or statement.lineno):
            if isinstance(statement, Function):
                return statement
            blocks = (
                [statement.body] if isinstance(statement, ast.ClassDef) else map(_get_block, iter_blocks(statement))
            )
            return next((function for block in blocks if (function := _find_function(block, line))), None)
    return None


def _get_block(pair: tuple[Sequence[ast.stmt], object]) -> Sequence[ast.stmt]:
    return pair[0]


def _find_local_dependencies(node: ast.AST, function: Sequence[ast.stmt]) -> list[ast.AST]:
    """Return an expression and what its function makes the names in it from."""
    definitions = Definitions(function)
    parts = {id(node): node}
    waiting = list(_iter_bare_names(node))
    seen = set(waiting)
    while waiting:
        for part in definitions.find_dependencies(ast.Name(id=waiting.pop())):
            if isinstance(part, ast.Name) or id(part) in parts or part in function:
                continue
            parts[id(part)] = part
            new = set(_iter_bare_names(part)) - seen
            seen |= new
            waiting += new
    return list(parts.values())


def _iter_bare_names(node: ast.AST) -> Iterator[str]:
    """Yield the names that a node reads without an object before them, dotted ones whole too; plans' names not."""
    for part in ast.walk(node):
        if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Load) and not plan_kind(part.id):
            yield part.id
        elif isinstance(part, ast.Attribute) and (name := get_dotted_name(part)) and not plan_kind(part.attr):
            yield from () if name.startswith("self.") else (name,)
