"""What the names in a file's expressions go back to: constants, and everything else that a value is made of."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from codemods.files.sources import SourceFile
from codemods.reading.names import Definitions, Function, get_dotted_name, get_identifier
from codemods.reading.pieces import iter_bindings
from plans.plan import plan_kind

__all__ = ["NameResolver", "parse_expression"]

_MUTATING_METHODS = frozenset(
    {"update", "setdefault", "pop", "popitem", "clear", "__setitem__", "__delitem__", "__ior__"}
)


@dataclass(frozen=True)
class NameResolver:
    """Looks up what a file's names are defined as.

    Args:
        source: the file, which parses.
    """

    source: SourceFile

    @cached_property
    def definitions(self) -> Definitions:
        """What the names of the file are defined as."""
        return Definitions(self._statements)

    def resolve_constant(self, name: str, scope: str = "") -> ast.expr | None:
        """Return what a name always stands for; None where it is assigned twice, is a parameter, or is changed.

        Args:
            name: dotted where it is an attribute of a class.
            scope: the qualified name of the class that it is used in.
        """
        if name.rpartition(".")[2] in self._unstable_names:
            return None
        names = (f"{scope}.{name}", name) if scope else (name,)
        return next((self._constants[one] for one in names if one in self._constants), None)

    def collect_dependencies(self, node: ast.AST) -> tuple[tuple[str, ...], frozenset[str]]:
        """Return the texts that an expression is made of, and the names in them.

        Plans' own names are not followed, nor what is defined in classes that are named.
        """
        found: dict[str, None] = {ast.unparse(node): None}
        names: dict[str, None] = dict.fromkeys(_iter_free_names(node))
        waiting = list(names)
        while waiting:
            name = waiting.pop()
            for part in self.definitions.find_dependencies(ast.Name(id=name)):
                text = ast.unparse(part)
                if isinstance(part, ast.Name) or text in found:
                    continue
                found[text] = None
                new = (
                    []
                    if isinstance(part, ast.ClassDef)
                    else [one for one in _iter_free_names(part) if one not in names]
                )
                names |= dict.fromkeys(new)
                waiting += new
        return tuple(sorted(found)), frozenset(names)

    def parse_span(self, span: tuple[int, int]) -> ast.AST:
        """Return the expression that stands at a place in the text."""
        return parse_expression(self.source.body[slice(*span)].decode())

    def find_statement(self, line: int) -> tuple[str, ast.stmt]:
        """Return the innermost statement that holds a line of code, with the function around it, empty without one."""
        function = ""
        found: ast.stmt | None = None
        waiting = list(self._statements)
        while waiting:
            one = waiting.pop()
            if one.lineno <= line <= (one.end_lineno or one.lineno):
                function = found.name if isinstance(found, Function) else function
                found = one
                waiting = [part for part in ast.walk(one) if isinstance(part, ast.stmt) and part is not one]
        assert found is not None
        return function, found

    @cached_property
    def _statements(self) -> Sequence[ast.stmt]:
        return ast.parse(self.source.body).body

    @cached_property
    def _constants(self) -> Mapping[str, ast.expr]:
        return dict(_iter_constants(self._statements, ""))

    @cached_property
    def _unstable_names(self) -> frozenset[str]:
        """The names that are bound more than once, bound by calls, or whose values are changed in place."""
        nodes = [node for statement in self._statements for node in ast.walk(statement)]
        bound = Counter(get_identifier(node) for node in nodes if isinstance(getattr(node, "ctx", None), ast.Store))
        changed = {name for node in nodes for name in _iter_changed_names(node)}
        return frozenset({name for name, times in bound.items() if times > 1} | changed)


def parse_expression(text: str) -> ast.AST:
    """Return an expression, or an item assignment, from its text."""
    try:
        return ast.parse(f"({text}\n)", mode="eval").body
    except SyntaxError:
        return ast.parse(text).body[0]


def _iter_constants(statements: Sequence[ast.stmt], scope: str) -> Iterator[tuple[str, ast.expr]]:
    for statement in statements:
        for target, value in iter_bindings(statement):
            if isinstance(target, ast.Name):
                yield f"{scope}{target.id}", value
        if isinstance(statement, ast.ClassDef):
            yield from _iter_constants(statement.body, f"{scope}{statement.name}.")


def _iter_changed_names(node: ast.AST) -> Iterator[str]:
    match node:
        case ast.arg(arg=name):
            yield name
        case ast.Subscript(value=holder, ctx=ast.Store() | ast.Del()):
            yield get_identifier(holder)
        case ast.Call(func=ast.Attribute(value=holder, attr=method)) if method in _MUTATING_METHODS:
            yield get_identifier(holder)


def _iter_free_names(node: ast.AST) -> Iterator[str]:
    """Yield the names that a piece of code reads, without those that it binds itself and those of plans."""
    parts = list(ast.walk(node))
    own = {get_identifier(part) for part in parts if isinstance(getattr(part, "ctx", None), ast.Store)}
    own |= {part.arg for part in parts if isinstance(part, ast.arg)}
    for part in parts:
        name = get_identifier(part)
        if name and name not in own and not plan_kind(name):
            yield name
            yield get_dotted_name(part) or name
