"""What one statement does to plans: what it writes into them, what it removes, and what cannot be read."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Container, Iterator, Sequence
from itertools import pairwise
from typing import TypeGuard

from codemods.files.sources import SourceFile
from codemods.reading.entries import can_hold_entries, read_entries, read_key, span
from codemods.reading.expressions import iter_bindings, iter_plan_names
from codemods.reading.module import ANY_KEY, Conflict, Removal, Unresolved
from codemods.reading.plan_literals import WriteKind
from codemods.reading.scope import Scope, is_plan_attribute, iter_expressions
from plans.plan import is_expert_parallel, plan_kind

__all__ = ["PlanName", "find_plan_values", "find_removals", "find_shared_plans", "find_unresolved_uses"]


_ADDING_METHODS = frozenset({"update", "setdefault", "__setitem__", "__ior__"})
"""Methods that add entries to a plan."""

PlanName = tuple[str, str]
"""The name of a class and the attribute of its plan."""


def find_plan_values(statement: ast.stmt, scope: Scope) -> Iterator[tuple[PlanName, ast.expr | ast.stmt, WriteKind]]:
    """Yield the expressions that a statement writes into plans: the plan, the expression, and what becomes of it."""
    for target, value in iter_bindings(statement):
        if not isinstance(target, ast.Subscript) and (plan := _resolve_plan(target, scope)):
            yield plan, value, _classify_binding(target, scope)
    match statement:
        case ast.Assign(targets=[ast.Subscript(value=holder, slice=key)], value=value):
            if plan := _resolve_plan(holder, scope):
                yield plan, _expand_loop(statement, key, value, scope.loops), "added"
            elif (name := read_key(key)) and plan_kind(name):
                yield (scope.class_name, name), value, "assigned"
        case ast.AugAssign(target=target, op=ast.BitOr(), value=value) if plan := _resolve_plan(target, scope):
            yield plan, value, "added"
        case ast.Return(value=ast.expr() as value) if plan_kind(scope.function):
            yield (scope.class_name, scope.function), value, "assigned"
    for expression in iter_expressions(statement):
        for node in ast.walk(expression):
            yield from _find_expression_values(node, scope)


def _classify_binding(target: ast.expr, scope: Scope) -> WriteKind:
    if _is_only_read(target, scope):
        return "read"
    return "added" if isinstance(target, ast.Name) and scope.function else "assigned"


def _is_only_read(target: ast.expr, scope: Scope) -> bool:
    """Return whether a target is a local name that the function does not write into a plan."""
    return isinstance(target, ast.Name) and bool(scope.function) and target.id not in scope.written_names


def _resolve_plan(node: ast.expr, scope: Scope) -> PlanName | None:
    """Return the plan that an expression refers to: `self._tp_plan`, or `model.tp_plan`, a property that sets it."""
    plan = scope.resolve_plan(node)
    if plan is None and isinstance(node, ast.Attribute) and plan_kind(node.attr):
        plan = node.attr
    return (scope.resolve_class(node), plan) if plan else None


def _find_expression_values(node: ast.AST, scope: Scope) -> Iterator[tuple[PlanName, ast.expr, WriteKind]]:
    match node:
        case ast.NamedExpr(target=target, value=value) if plan := _resolve_plan(target, scope):
            yield plan, value, "read" if _is_only_read(target, scope) else "added"
        case ast.Call(func=ast.Attribute(value=holder, attr=method)) if method in _ADDING_METHODS and (
            plan := _resolve_plan(holder, scope)
        ):
            yield plan, node, "added"
        case ast.Call(func=ast.Name(id="setattr"), args=[owner, key, value]) if plan_kind(name := read_key(key) or ""):
            yield (scope.resolve_owner(owner), name), value, "assigned"
            return
    kind: WriteKind = "default" if _takes_default(node) else "assigned"
    for label, value in _iter_named_values(node):
        if label and plan_kind(label):
            yield (scope.class_name, label), value, kind


def _takes_default(node: ast.AST) -> bool:
    """Return whether the named values of a node only stand in for values that are missing elsewhere."""
    match node:
        case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name)):
            return name in ("getattr", "getattr_static", "get", "pop", "setdefault")
        case ast.arguments():
            return True
    return False


def _iter_named_values(node: ast.AST) -> Iterator[tuple[str | None, ast.expr]]:
    """Yield the values that have a name: arguments, defaults of parameters, and values of a display."""
    match node:
        case ast.Call(args=arguments, keywords=keywords):
            yield from ((keyword.arg, keyword.value) for keyword in keywords)
            for name, value in pairwise(arguments):
                yield read_key(name), value
        case ast.Dict(keys=keys, values=values):
            for key, value in zip(keys, values, strict=True):
                yield (read_key(key) if key else None), value
        case ast.arguments(posonlyargs=first, args=others, kwonlyargs=named):
            positional = [*first, *others]
            with_default = positional[len(positional) - len(node.defaults) :]
            yield from ((one.arg, value) for one, value in zip(with_default, node.defaults, strict=True))
            yield from ((one.arg, value) for one, value in zip(named, node.kw_defaults, strict=True) if value)


def _expand_loop(
    statement: ast.Assign, key: ast.expr, value: ast.expr, loops: Sequence[ast.For]
) -> ast.stmt | ast.expr:
    """Return an item assignment, or the equivalent comprehension if its key is the variable of a loop."""
    for loop in loops:
        if isinstance(key, ast.Name) and key.id in {
            part.id for part in ast.walk(loop.target) if isinstance(part, ast.Name)
        }:
            generator = ast.comprehension(target=loop.target, iter=loop.iter, ifs=[], is_async=0)
            return ast.copy_location(ast.DictComp(key=key, value=value, generators=[generator]), statement)
    return statement


def find_removals(statement: ast.stmt, scope: Scope) -> Iterator[Removal]:
    """Yield the entries that a statement itself, without the blocks in it, removes from plans.

    Args:
        statement: the statement.
        scope: the scope of the statement.
    """
    for holder, key in _iter_removed_keys(statement):
        if plan := scope.resolve_plan(holder):
            yield Removal(plan, key, statement.lineno, scope.function, scope.conditions, scope.resolve_class(holder))


def _iter_removed_keys(statement: ast.stmt) -> Iterator[tuple[ast.expr, str | None]]:
    """Yield each removed key with the object it is removed from: None for all keys, `ANY_KEY` for a computed one."""
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
    """Yield the plans to which a statement adds entries in a way that cannot be read.

    Args:
        statement: the statement, without the blocks in it.
        scope: the scope of the statement.
        source: the file.
        read_ids: the ids of the nodes in the statement that were read.
    """
    filled = [
        (scope.resolve_class(holder), plan)
        for holder in _find_item_holders(statement)
        if (plan := scope.resolve_plan(holder))
    ]
    for owner, plan in dict.fromkeys(filled):
        experts = b"experts" in source.body[slice(*span(statement, source.offset))]
        is_known_class = scope.is_known_class(owner)
        yield Unresolved(
            owner if is_known_class else scope.class_name,
            plan,
            statement.lineno,
            experts,
            function=scope.function,
            owner="" if is_known_class else owner,
        )
    for expression in iter_expressions(statement):
        for call in ast.walk(expression):
            if isinstance(call, ast.Call) and (plan := _find_filled_plan(call, scope, source, read_ids)):
                yield Unresolved(
                    scope.class_name, plan, statement.lineno, mentions_experts=True, function=scope.function
                )
                return


def find_shared_plans(statement: ast.stmt, scope: Scope) -> Iterator[Conflict]:
    """Yield the plans that a statement makes the same object as an expert-parallel plan, `tp_plan = ep_plan = {…}`."""
    plans_by_value: dict[int, list[PlanName]] = defaultdict(list)
    for target, value in iter_bindings(statement):
        if plan := scope.resolve_plan(target):
            plans_by_value[id(value)].append((scope.resolve_class(target), plan))
    for plans in plans_by_value.values():
        if any(is_expert_parallel(plan) for _, plan in plans):
            yield from (
                Conflict(owner, plan, None, statement.lineno, "also makes it an expert-parallel plan", scope.function)
                for owner, plan in plans
                if not is_expert_parallel(plan)
            )


def _find_item_holders(statement: ast.stmt) -> Iterator[ast.expr]:
    """Yield the objects whose items are assigned by a statement with several targets."""
    match statement:
        case ast.Assign(targets=[ast.Subscript()]):
            return
        case ast.Assign(targets=targets):
            for target in targets:
                yield from (part.value for part in ast.walk(target) if _is_stored_item(part))


def _is_stored_item(node: ast.AST) -> TypeGuard[ast.Subscript]:
    return isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store)


def _find_filled_plan(call: ast.Call, scope: Scope, source: SourceFile, read_ids: Container[int]) -> str | None:
    """Return the plan that is an argument of a call together with entries of experts that were not read, or None."""
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
