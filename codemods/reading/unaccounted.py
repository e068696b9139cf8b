"""Statements that put entries into a plan in a way that is not read, or make one plan of two."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Container, Iterator
from typing import TypeGuard

from codemods.files.sources import SourceFile
from codemods.reading.blocks import iter_expressions
from codemods.reading.entries import can_hold_entries, read_entries, span
from codemods.reading.module import Conflict, Unresolved
from codemods.reading.pieces import iter_bindings, iter_plan_names
from codemods.reading.plan_names import is_plan_attribute
from codemods.reading.scope import Scope
from plans.plan import is_expert_parallel

__all__ = ["find_shared_plans", "find_unresolved_uses"]

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
