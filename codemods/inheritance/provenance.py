"""Provenance: the texts that determine an expression's value, in its own file and in those that it imports from.

A comment is never part of it. In a model's file every name counts that occurs in what the expression depends on, and
each file that it imports from counts as a whole. The framework's own code refers to most of itself in one way or
another; there, only what plain names stand for counts.
"""

from __future__ import annotations

import ast
import sys
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
            parts = _find_local_dependencies(node, function, line)
            texts |= {ast.unparse(part) for part in parts}
            for name in {name for part in parts for name in _iter_longest_names(part)}:
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
            for part in (part for statement in statements for part in _select_attribute(statement, name)):
                files.add(file)
                if isinstance(part, ast.stmt):
                    texts.add(self._unparse(part))
                if not isinstance(part, ast.ClassDef):
                    waiting += [(file, read) for read in _iter_longest_names(part)]
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
            self._definitions[path] = _group_definitions(resolver.definitions.statements if resolver else ())
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
        targets = [target for target, _ in iter_bindings(statement)]
        match statement:
            case ast.AugAssign(target=target) | ast.Expr(value=ast.Call(func=ast.Attribute(value=target))):
                targets.append(target)
        yield from ((name, statement) for target in targets if (name := _get_first_name(target)))
        for block, _ in iter_blocks(statement):
            yield from _iter_definitions(block)


def _get_first_name(target: ast.expr) -> str | None:
    """Return the name that an expression begins with: `Experts` of `Experts.styles["norm"]`."""
    while isinstance(target, ast.Attribute | ast.Subscript):
        target = target.value
    return target.id if isinstance(target, ast.Name) else None


def _select_attribute(statement: ast.stmt, name: str) -> Iterator[ast.stmt | ast.expr]:
    """Yield what a name depends on in the statement that binds its first part.

    Of a class whose attribute is read, that is what assigns the attribute in its body. If other names of the body take
    part or the attribute may be inherited, it is the class as a whole, and the attribute of its bases.
    """
    attribute = name.split(".")[1] if "." in name else ""
    if not isinstance(statement, ast.ClassDef) or not attribute:
        yield statement
        return
    bound = dict(_group_definitions(statement.body))
    found = bound.get(attribute, [])
    others = bound.keys() & {read for part in found for read in _iter_bare_names(part)}
    if found and not others and not any(isinstance(part, (Function, ast.ClassDef)) for part in found):
        yield from found
        return
    yield statement
    yield from (ast.Attribute(base, attribute, ast.Load()) for base in statement.bases)


def _group_definitions(statements: Iterable[ast.stmt]) -> Mapping[str, list[ast.stmt]]:
    """Return the statements that bind each name among statements and in their blocks."""
    found: dict[str, list[ast.stmt]] = defaultdict(list)
    for name, statement in _iter_definitions(statements):
        found[name].append(statement)
    return found


def _find_function(statements: Iterable[ast.stmt], line: int) -> Function | None:
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


def _find_last_line(statements: Iterable[ast.stmt], line: int) -> int:
    """Return the last line whose code can run before that on a line: the end of its statement, or of a loop around it.

    An inner function may be called at any time, so that all of the code around it can run before.
    """
    for statement in statements:
        end = statement.end_lineno or statement.lineno
        if not statement.lineno <= line <= end:
            continue
        if isinstance(statement, (ast.For, ast.AsyncFor, ast.While)):
            return end
        if isinstance(statement, (Function, ast.ClassDef)):
            return sys.maxsize
        blocks = [block for block, _ in iter_blocks(statement)]
        inner = [_find_last_line(block, line) for block in blocks if block and _is_around(block, line)]
        return inner[0] if inner else end
    return line


def _is_around(block: Sequence[ast.stmt], line: int) -> bool:
    return block[0].lineno <= line <= (block[-1].end_lineno or block[-1].lineno)


def _find_local_dependencies(node: ast.AST, function: Function | None, line: int) -> list[ast.AST]:
    """Return an expression and what its function makes the names in it from, up to the expression's line."""
    definitions = Definitions([function] if function else [])
    last = _find_last_line(function.body, line) if function else line
    parts = {id(node): node}
    waiting = list(_iter_bare_names(node))
    seen = set(waiting)
    while waiting:
        for part in definitions.find_dependencies(ast.Name(id=waiting.pop())):
            if isinstance(part, ast.Name) or id(part) in parts or part is function:
                continue
            if getattr(part, "lineno", 0) > last:
                continue
            parts[id(part)] = part
            new = set(_iter_bare_names(part)) - seen
            seen |= new
            waiting += new
    return list(parts.values())


def _iter_bare_names(node: ast.AST) -> Iterator[str]:
    """Yield the names that a node reads without an object before them, parts of dotted ones too; plans' names not."""
    return filter(None, map(_get_bare_name, ast.walk(node)))


def _iter_longest_names(node: ast.AST) -> Iterator[str]:
    """Yield the same names, but not the parts of dotted ones: `Experts.styles` without `Experts`."""
    parts = list(ast.walk(node))
    holders = {id(part.value) for part in parts if isinstance(part, ast.Attribute) and _get_bare_name(part)}
    return filter(None, (_get_bare_name(part) for part in parts if id(part) not in holders))


def _get_bare_name(node: ast.AST) -> str | None:
    match node:
        case ast.Name(id=name, ctx=ast.Load()) if not plan_kind(name):
            return name
        case ast.Attribute(attr=attribute) if not plan_kind(attribute):
            dotted = get_dotted_name(node)
            return dotted if dotted and not dotted.startswith("self.") else None
    return None
