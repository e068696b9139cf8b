"""Entries that code takes out of plans again."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from codemods.reading.blocks import iter_expressions
from codemods.reading.entries import read_key
from codemods.reading.module import ANY_KEY, Removal
from codemods.reading.pieces import iter_bindings
from codemods.reading.scope import Scope

__all__ = ["find_removals"]


def find_removals(statement: ast.stmt, scope: Scope) -> Iterator[Removal]:
    """Yield what a statement itself, not the blocks in it, takes out of plans.

    Args:
        statement: the statement.
        scope: where it stands.
    """
    for holder, key in _iter_removed_keys(statement):
        if plan := scope.resolve_plan(holder):
            yield Removal(plan, key, statement.lineno, scope.function, scope.conditions, scope.resolve_class(holder))


def _iter_removed_keys(statement: ast.stmt) -> Iterator[tuple[ast.expr, str | None]]:
    """Yield a holder of entries with the key that leaves it, None for all keys, a wildcard for one that is computed."""
    for target in statement.targets if isinstance(statement, ast.Delete) else ():
        match target:
            case ast.Subscript(value=holder, slice=key):
                yield holder, read_key(key) or ANY_KEY
            case ast.Attribute():
                yield target, None
    for target, value in iter_bindings(statement):
        if isinstance(target, ast.Attribute) and isinstance(value, ast.Constant) and value.value is None:
            yield target, None
    for expression in iter_expressions(statement):
        for part in ast.walk(expression):
            match part:
                case ast.Call(func=ast.Attribute(value=holder, attr="pop"), args=[key, *_]):
                    yield holder, read_key(key) or ANY_KEY
                case ast.Call(func=ast.Attribute(value=holder, attr="popitem"), args=[]):
                    yield holder, ANY_KEY
                case ast.Call(func=ast.Attribute(value=holder, attr="clear"), args=[]):
                    yield holder, None
