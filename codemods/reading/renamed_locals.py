"""Functions compared up to the names of their local variables, which say nothing about what a function does."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest

from codemods.files.sources import SourceFile
from codemods.reading.entries import span
from codemods.reading.names import Function

__all__ = ["restore_local_names"]


ParsedFile = tuple[SourceFile, Sequence[ast.stmt]]
"""A file with its statements."""


def restore_local_names(before: ParsedFile, after: ParsedFile) -> None:
    """Give the local variables of functions the names that they had, where nothing else in a function has changed.

    Args:
        before: a file as it was.
        after: the file as it is; its nodes are changed.
    """
    earlier = dict(_iter_functions(before[1], ""))
    for name, function in _iter_functions(after[1], ""):
        if name in earlier and _read_text(before[0], earlier[name]) != _read_text(after[0], function):
            _restore(earlier[name], function)


def _read_text(source: SourceFile, function: Function) -> bytes:
    return source.body[slice(*span(function, source.offset))]


def _iter_functions(statements: Sequence[ast.stmt], scope: str) -> Iterator[tuple[str, Function]]:
    """Yield the functions of a file and of its classes with their qualified names; of several the last one counts."""
    for statement in statements:
        if isinstance(statement, Function):
            yield f"{scope}{statement.name}", statement
        elif isinstance(statement, ast.ClassDef):
            yield from _iter_functions(statement.body, f"{scope}{statement.name}.")


def _restore(old: Function, new: Function) -> None:
    names = _match_names(old, new)
    for node in ast.walk(new) if names else ():
        if isinstance(node, ast.Name):
            node.id = names.get(node.id, node.id)
        elif isinstance(node, ast.ExceptHandler) and node.name:
            node.name = names.get(node.name, node.name)


def _match_names(old: Function, new: Function) -> Mapping[str, str]:
    """Return the old names of a function's variables by the new ones, empty if they or anything else cannot be matched.

    Every occurrence must have the same partner, in both directions, and be a variable of the function on both sides.
    """
    partners: dict[str, str] = {}
    for one, other in zip_longest(_iter_parts(old), _iter_parts(new)):
        if isinstance(one, _Name) and isinstance(other, _Name):
            if partners.setdefault(other, one) != one:
                return {}
        elif one != other:
            return {}
    renamed = {new_name: old_name for new_name, old_name in partners.items() if new_name != old_name}
    if not renamed:
        return {}
    is_unique = len(set(partners.values())) == len(partners)
    is_local = renamed.keys() <= _find_locals(new) and set(renamed.values()) <= _find_locals(old)
    return renamed if is_unique and is_local else {}


class _Name(str):
    """The name of a variable, which may have another one in the other function."""

    __slots__ = ()


def _iter_parts(node: ast.AST) -> Iterator[object]:
    """Yield what a node consists of, in order: types, names of variables, and all other values."""
    yield type(node)
    for field, value in ast.iter_fields(node):
        if isinstance(node, (ast.Name, ast.ExceptHandler)) and isinstance(value, str):
            yield _Name(value)
        elif isinstance(value, ast.AST):
            yield from _iter_parts(value)
        elif isinstance(value, list):
            yield len(value)
            for item in value:
                if isinstance(item, ast.AST):
                    yield from _iter_parts(item)
                else:
                    yield item
        else:
            yield field
            yield type(value), value


def _find_locals(function: Function) -> set[str]:
    """Return the variables that a function binds itself, and no inner scope in another way."""
    bound: set[str] = set()
    others: set[str] = set()
    for node in ast.walk(function):
        match node:
            case ast.Name(id=name, ctx=ast.Store() | ast.Del()) | ast.ExceptHandler(name=str(name)):
                bound.add(name)
            case ast.arg(arg=name) | ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                others.add(name)
            case ast.ClassDef(name=name) | ast.MatchAs(name=str(name)) | ast.MatchStar(name=str(name)):
                others.add(name)
            case ast.MatchMapping(rest=str(name)) | ast.alias(asname=str(name)) | ast.alias(asname=None, name=name):
                others.add(name.partition(".")[0])
            case ast.Global(names=names) | ast.Nonlocal(names=names):
                others.update(names)
    return bound - others
