"""The expressions by which a statement puts entries into a plan, each with the plan."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from itertools import pairwise

from codemods.reading.blocks import iter_expressions
from codemods.reading.pieces import iter_bindings
from codemods.reading.scope import Scope
from plans.plan import plan_kind

__all__ = ["PlanName", "find_plan_values"]

_ADDING_METHODS = frozenset({"update", "setdefault", "__setitem__", "__ior__"})
"""Methods that put entries into a plan."""

PlanName = tuple[str, str]
"""A class and its plan."""


def find_plan_values(statement: ast.stmt, scope: Scope) -> Iterator[tuple[PlanName, ast.expr | ast.stmt, bool]]:
    """Yield plan, expression, and whether the expression becomes the plan."""
    for target, value in iter_bindings(statement):
        if not isinstance(target, ast.Subscript) and (plan := _resolve_plan(target, scope)):
            yield plan, value, not isinstance(target, ast.Name) or not scope.function
    match statement:
        case ast.Assign(targets=[ast.Subscript(value=holder, slice=key)], value=value):
            if plan := _resolve_plan(holder, scope):
                yield plan, _expand_loop(statement, key, value, scope.loops), False
            elif isinstance(key, ast.Constant) and isinstance(key.value, str) and plan_kind(key.value):
                yield (scope.class_name, key.value), value, True
        case ast.AugAssign(target=target, op=ast.BitOr(), value=value) if plan := _resolve_plan(target, scope):
            yield plan, value, False
        case ast.Return(value=ast.expr() as value) if plan_kind(scope.function):
            yield (scope.class_name, scope.function), value, True
    for expression in iter_expressions(statement):
        for node in ast.walk(expression):
            yield from _find_expression_values(node, scope)


def _resolve_plan(node: ast.expr, scope: Scope) -> PlanName | None:
    plan = scope.resolve_plan(node)
    return (scope.resolve_class(node), plan) if plan else None


def _find_expression_values(node: ast.AST, scope: Scope) -> Iterator[tuple[PlanName, ast.expr, bool]]:
    match node:
        case ast.NamedExpr(target=target, value=value) if plan := _resolve_plan(target, scope):
            yield plan, value, False
        case ast.Call(func=ast.Attribute(value=holder, attr=method)) if method in _ADDING_METHODS and (
            plan := _resolve_plan(holder, scope)
        ):
            yield plan, node, False
        case ast.Call(func=ast.Name(id="setattr"), args=[_, ast.Constant(value=str(name)), value]) if plan_kind(name):
            yield (scope.class_name, name), value, True
            return
    for beside, value in _iter_named_values(node):
        if beside and plan_kind(beside):
            yield (scope.class_name, beside), value, True


def _iter_named_values(node: ast.AST) -> Iterator[tuple[str | None, ast.expr]]:
    """Yield the values that stand beside a name: arguments, defaults of parameters, values of a display."""
    match node:
        case ast.Call(args=arguments, keywords=keywords):
            yield from ((keyword.arg, keyword.value) for keyword in keywords)
            for name, value in pairwise(arguments):
                if isinstance(name, ast.Constant) and isinstance(name.value, str):
                    yield name.value, value
        case ast.Dict(keys=keys, values=values):
            for key, value in zip(keys, values, strict=True):
                if isinstance(key, ast.Constant) and isinstance(key.value, str):
                    yield key.value, value
        case ast.arguments(posonlyargs=first, args=others, kwonlyargs=named):
            positional = [*first, *others]
            with_default = positional[len(positional) - len(node.defaults) :]
            yield from ((one.arg, value) for one, value in zip(with_default, node.defaults, strict=True))
            yield from ((one.arg, value) for one, value in zip(named, node.kw_defaults, strict=True) if value)


def _expand_loop(
    statement: ast.Assign, key: ast.expr, value: ast.expr, loops: Sequence[ast.For]
) -> ast.stmt | ast.expr:
    """Return an item assignment, or where its key is a loop's own the comprehension that says the same."""
    for loop in loops:
        if isinstance(key, ast.Name) and key.id in {
            part.id for part in ast.walk(loop.target) if isinstance(part, ast.Name)
        }:
            over = ast.comprehension(target=loop.target, iter=loop.iter, ifs=[], is_async=0)
            return ast.copy_location(ast.DictComp(key=key, value=value, generators=[over]), statement)
    return statement
