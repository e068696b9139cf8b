"""The expressions by which a statement puts entries into a plan, each with the plan."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Container, Iterator, Sequence
from itertools import pairwise
from typing import TypeGuard

from codemods.files.sources import SourceFile
from codemods.reading.conditions import iter_expressions
from codemods.reading.entries import can_hold_entries, read_entries, read_key, span
from codemods.reading.expressions import iter_bindings, iter_plan_names
from codemods.reading.module import ANY_KEY, Conflict, Removal, Unresolved
from codemods.reading.scope import Scope, is_plan_attribute
from plans.plan import is_expert_parallel, plan_kind

__all__ = ["PlanName", "find_plan_values", "find_removals", "find_shared_plans", "find_unresolved_uses"]


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


_COMPARISON_PREFIXES = ("assert", "compare", "check")


def find_unresolved_uses(
    statement: ast.stmt, scope: Scope, source: SourceFile, read_ids: Container[int]
) -> Iterator[Unresolved]:
    """Yield the plans that get entries from a statement in a way that nobody here reads.

    Args:
        statement: the statement; blocks in it are not looked into.
        scope: where it stands.
        source: the file.
        read_ids: the identities of the nodes in it that were read.
    """
    filled = [
        (scope.resolve_class(holder), plan)
        for holder in _find_item_holders(statement)
        if (plan := scope.resolve_plan(holder))
    ]
    for owner, plan in dict.fromkeys(filled):
        experts = b"experts" in source.body[slice(*span(statement, source.offset))]
        yield Unresolved(owner, plan, statement.lineno, experts)
    for expression in iter_expressions(statement):
        for call in ast.walk(expression):
            if isinstance(call, ast.Call) and (plan := _find_filled_plan(call, scope, source, read_ids)):
                yield Unresolved(scope.class_name, plan, statement.lineno, mentions_experts=True)
                return


def find_shared_plans(statement: ast.stmt, scope: Scope) -> Iterator[Conflict]:
    """Yield the plans that a statement makes one with an expert-parallel plan, `tp_plan = ep_plan = {…}`."""
    plans: dict[int, list[tuple[str, str]]] = defaultdict(list)
    for target, value in iter_bindings(statement):
        if plan := scope.resolve_plan(target):
            plans[id(value)].append((scope.resolve_class(target), plan))
    for together in plans.values():
        if any(is_expert_parallel(plan) for _, plan in together):
            why = f"line {statement.lineno} makes it an expert-parallel plan too"
            yield from (Conflict(owner, plan, None, why) for owner, plan in together if not is_expert_parallel(plan))


def _find_item_holders(statement: ast.stmt) -> Iterator[ast.expr]:
    """Yield what items are assigned to where a statement assigns several things at once."""
    match statement:
        case ast.Assign(targets=[ast.Subscript()]):
            return
        case ast.Assign(targets=targets):
            for target in targets:
                yield from (part.value for part in ast.walk(target) if _is_stored_item(part))


def _is_stored_item(node: ast.AST) -> TypeGuard[ast.Subscript]:
    return isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store)


def _find_filled_plan(call: ast.Call, scope: Scope, source: SourceFile, read_ids: Container[int]) -> str | None:
    """Return the plan that a call is given together with entries of experts which were not read."""
    name = call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")
    if name.startswith(_COMPARISON_PREFIXES):
        return None
    parts = list(ast.walk(call))
    named = (plan for part in parts for plan in _read_plan_names(part, scope))
    plan = next(filter(is_plan_attribute, named), None)
    return (
        plan if plan and any(_has_expert_entries(part, source) for part in parts if id(part) not in read_ids) else None
    )


def _read_plan_names(node: ast.AST, scope: Scope) -> Iterator[str]:
    yield from iter_plan_names(node)
    if isinstance(node, ast.Name) and node.id in scope.aliases:
        yield scope.aliases[node.id]


def _has_expert_entries(node: ast.AST, source: SourceFile) -> bool:
    return can_hold_entries(node) and any("experts" in entry.key for entry in read_entries([node], source.offset))
