"""Statements that put entries into a plan in a way that is not read, or make one plan of two."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Container, Iterator
from typing import TypeGuard

from codemods.files.sources import Source
from codemods.reading.blocks import own_expressions
from codemods.reading.entries import read_entries, span, writes_entries
from codemods.reading.module import Hold, Unread
from codemods.reading.pieces import bindings, plan_names
from codemods.reading.plan_names import is_plan_attribute
from codemods.reading.scope import Scope
from plans.plan import is_expert_parallel

__all__ = ["shared_plans", "unaccounted"]

_COMPARING = ("assert", "compare", "check")


def unaccounted(statement: ast.stmt, scope: Scope, source: Source, read: Container[int]) -> Iterator[Unread]:
    """Yield the plans that get entries from a statement in a way that nobody here reads.

    Args:
        statement: the statement; blocks in it are not looked into.
        scope: where it stands.
        source: the file.
        read: the identities of the nodes in it that were read.
    """
    filled = [(scope.class_of(holder), plan) for holder in _items(statement) if (plan := scope.plan_of(holder))]
    for owner, plan in dict.fromkeys(filled):
        experts = b"experts" in source.body[slice(*span(statement, source.offset))]
        yield Unread(owner, plan, statement.lineno, experts)
    for expression in own_expressions(statement):
        for call in ast.walk(expression):
            if isinstance(call, ast.Call) and (plan := _filled(call, scope, source, read)):
                yield Unread(scope.class_name, plan, statement.lineno, experts=True)
                return


def shared_plans(statement: ast.stmt, scope: Scope) -> Iterator[Hold]:
    """Yield the plans that a statement makes one with an expert-parallel plan, `tp_plan = ep_plan = {…}`."""
    plans: dict[int, list[tuple[str, str]]] = defaultdict(list)
    for target, value in bindings(statement):
        if plan := scope.plan_of(target):
            plans[id(value)].append((scope.class_of(target), plan))
    for together in plans.values():
        if any(is_expert_parallel(plan) for _, plan in together):
            why = f"line {statement.lineno} makes it an expert-parallel plan too"
            yield from (Hold(owner, plan, None, why) for owner, plan in together if not is_expert_parallel(plan))


def _items(statement: ast.stmt) -> Iterator[ast.expr]:
    """Yield what items are assigned to where a statement assigns several things at once."""
    match statement:
        case ast.Assign(targets=[ast.Subscript()]):
            return
        case ast.Assign(targets=targets):
            for target in targets:
                yield from (part.value for part in ast.walk(target) if _is_stored_item(part))


def _is_stored_item(node: ast.AST) -> TypeGuard[ast.Subscript]:
    return isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store)


def _filled(call: ast.Call, scope: Scope, source: Source, read: Container[int]) -> str | None:
    """Return the plan that a call is given together with entries of experts which were not read."""
    name = call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")
    if name.startswith(_COMPARING):
        return None
    parts = list(ast.walk(call))
    named = (plan for part in parts for plan in _plans(part, scope))
    plan = next(filter(is_plan_attribute, named), None)
    return plan if plan and any(_writes_experts(part, source) for part in parts if id(part) not in read) else None


def _plans(node: ast.AST, scope: Scope) -> Iterator[str]:
    yield from plan_names(node)
    if isinstance(node, ast.Name) and node.id in scope.names:
        yield scope.names[node.id]


def _writes_experts(node: ast.AST, source: Source) -> bool:
    return writes_entries(node) and any("experts" in entry.key for entry in read_entries([node], source.offset))
