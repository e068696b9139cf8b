"""Expressions that make a plan, taken apart: the pieces that write entries down, and those that lead elsewhere.

`{**BASE, "norm": "x"} if small else dict(OTHER)` has three: `BASE` and the display where `small` is true, and `OTHER`
where it is not.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, replace

from codemods.reading.entries import writes_entries
from codemods.reading.module import Condition
from plans.plan import plan_kind

__all__ = ["Piece", "bindings", "mentions_plan", "pieces", "plan_names"]

_WRAPPERS = frozenset({"dict", "OrderedDict", "MappingProxyType", "copy", "deepcopy", "field", "update", "__ior__"})
"""Functions whose result holds what their arguments hold."""


@dataclass(frozen=True)
class Piece:
    """A part of an expression that makes a plan.

    Args:
        node: the part.
        conditions: those of the conditional expressions that it stands in, outermost first.
        writes: whether it writes entries down; if not, they are written elsewhere.
        partial: whether only some of its entries are taken.
    """

    node: ast.AST
    conditions: tuple[Condition, ...] = ()
    writes: bool = False
    partial: bool = False


def pieces(node: ast.AST, around: tuple[Condition, ...] = ()) -> Iterator[Piece]:
    """Yield the pieces of an expression, of a call `plan.update(…)` or of an item assignment, in order.

    Args:
        node: the expression.
        around: conditions that hold for all of it.
    """
    match node:
        case ast.IfExp(test=test, body=body, orelse=orelse):
            yield from pieces(body, (*around, Condition(ast.unparse(test), True)))
            yield from pieces(orelse, (*around, Condition(ast.unparse(test), False)))
        case ast.BoolOp(op=operator, values=[*first, last]):
            # Of `a or b` either may be the value; of `a and b` a false `a` has no entries.
            tests = tuple(Condition(ast.unparse(value), isinstance(operator, ast.And)) for value in first)
            for value in first if isinstance(operator, ast.Or) else ():
                yield from pieces(value, around)
            yield from pieces(last, (*around, *tests))
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            yield from pieces(left, around)
            yield from pieces(right, around)
        case ast.NamedExpr(value=value) | ast.Lambda(body=value):
            yield from pieces(value, around)
        case ast.Dict(keys=keys, values=values):
            yield Piece(node, around, writes=True)
            for key, value in zip(keys, values, strict=True):
                if key is None:
                    yield from pieces(value, around)
        case ast.DictComp():
            yield from _of_comprehension(node, around)
        case ast.Call():
            yield from _of_call(node, around)
        case ast.Constant(value=None) | ast.Name(id="dict"):
            return
        case _:
            yield Piece(node, around, writes_entries(node))


def bindings(statement: ast.AST) -> Iterator[tuple[ast.expr, ast.expr]]:
    """Yield what an assignment assigns: every target with its value, tuples taken apart."""
    match statement:
        case ast.Assign(targets=targets, value=value):
            for target in targets:
                if isinstance(target, (ast.Tuple, ast.List)) and isinstance(value, (ast.Tuple, ast.List)):
                    yield from zip(target.elts, value.elts, strict=False)
                else:
                    yield target, value
        case ast.AnnAssign(target=target, value=ast.expr() as value) | ast.NamedExpr(target=target, value=value):
            yield target, value


def mentions_plan(node: ast.AST) -> bool:
    """Say whether an expression reads something that has a plan's name: `self._tp_plan`, `getattr(x, "_tp_plan")`."""
    return any(True for part in ast.walk(node) for _ in plan_names(part))


def plan_names(node: ast.AST) -> Iterator[str]:
    """Yield the plan that a node itself names."""
    match node:
        case ast.Attribute(attr=name) | ast.Name(id=name) | ast.Constant(value=str(name)):
            if plan_kind(name):
                yield name


def _of_call(call: ast.Call, around: tuple[Condition, ...]) -> Iterator[Piece]:
    name = call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")
    if name == "AttributeError":
        return
    if isinstance(call.func, ast.Attribute) and name == "copy" and not call.args:
        yield from pieces(call.func.value, around)
        return
    arguments = [*call.args, *(keyword.value for keyword in call.keywords)]
    if name == "field":
        arguments = [keyword.value for keyword in call.keywords if keyword.arg in ("default", "default_factory")]
    elif writes_entries(call):
        yield Piece(call, around, writes=True)
        arguments = [*call.args, *(keyword.value for keyword in call.keywords if keyword.arg is None)]
        if name not in _WRAPPERS:
            return
    found = [piece for argument in arguments for piece in pieces(argument, around)]
    if name not in _WRAPPERS:
        # What an unknown function makes of its arguments is its own affair, but displays are there to be read.
        found = [piece for piece in found if piece.writes] or [Piece(call, around)]
    yield from found


def _of_comprehension(node: ast.DictComp, around: tuple[Condition, ...]) -> Iterator[Piece]:
    taken = _taken_over(node)
    if taken is None:
        yield Piece(node, around, writes_entries(node))
    else:
        filtered = any(generator.ifs for generator in node.generators)
        yield from (replace(piece, partial=piece.partial or filtered) for piece in pieces(taken, around))


def _taken_over(node: ast.DictComp) -> ast.expr | None:
    """Return the plan whose entries a comprehension takes over as they are, `{k: v for k, v in PLAN.items()}`."""
    match node:
        case ast.DictComp(
            key=ast.Name(id=key),
            value=ast.Name(id=value),
            generators=[
                ast.comprehension(
                    target=ast.Tuple(elts=[ast.Name(id=first), ast.Name(id=second)]),
                    iter=ast.Call(func=ast.Attribute(value=plan, attr="items"), args=[]),
                )
            ],
        ) if (key, value) == (first, second):
            return plan
    return None
