"""The source of a class's forward, with the methods that it calls, as syntax trees; it is parsed and never run."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator, Mapping
from functools import lru_cache

__all__ = ["read_forward"]


def read_forward(module_class: type) -> Mapping[str, ast.FunctionDef]:
    """Return a class's forward and the methods that it calls, by name, nothing if its source cannot be read.

    torch's own classes and functions are left out.
    """
    return _read_forward(module_class)


@lru_cache(maxsize=1024)
def _read_forward(module_class: object) -> Mapping[str, ast.FunctionDef]:
    methods: dict[str, ast.FunctionDef] = {}
    waiting = ["forward"]
    while waiting:
        name = waiting.pop()
        tree = None if name in methods else _parse_source(inspect.getattr_static(module_class, name, None))
        if tree is not None:
            methods[name] = tree
            waiting += _find_called_methods(tree)
    return methods


def _parse_source(function: object) -> ast.FunctionDef | None:
    """Return a function's source as a tree, None for torch's own functions and for those without a source file."""
    function = function.__func__ if isinstance(function, staticmethod | classmethod) else function
    if not inspect.isfunction(function) or function.__module__.startswith("torch."):
        return None
    try:
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    except (OSError, SyntaxError):
        return None
    return tree if isinstance(tree, ast.FunctionDef) else None


def _find_called_methods(tree: ast.FunctionDef) -> Iterator[str]:
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Attribute(value=ast.Name("self"), attr=method)):
                yield method
