"""Splitting expressions that make a plan into parts: some write entries, others refer to entries written elsewhere.

`{**BASE, "norm": "x"} if small else dict(OTHER)` has three parts: `BASE` and the display if `small` is true, and
`OTHER` if it is false.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from codemods.reading.entries import can_hold_entries
from codemods.reading.module import Condition
from plans.plan import plan_kind

__all__ = [
    "PlanPart",
    "find_renamed_plan",
    "has_plan_name",
    "is_empty",
    "is_plan_reference",
    "iter_bindings",
    "iter_children",
    "iter_plan_names",
    "split_expression",
    "walk_statements",
]

_WRAPPERS = frozenset({"dict", "OrderedDict", "MappingProxyType", "copy", "deepcopy", "field", "update", "__ior__"})
"""Functions whose result contains the entries of their arguments."""


@dataclass(frozen=True)
class PlanPart:
    """A part of an expression that makes a plan.

    Args:
        node: the part.
        conditions: the conditions of the enclosing conditional expressions, outermost first.
        has_entries: whether it writes entries itself; if not, they are written elsewhere.
        is_filtered: whether only some of its entries are used.
    """

    node: ast.AST
    conditions: tuple[Condition, ...] = ()
    has_entries: bool = False
    is_filtered: bool = False


def split_expression(node: ast.AST, conditions: tuple[Condition, ...] = ()) -> Iterator[PlanPart]:
    """Yield the parts of an expression, of a call `plan.update(…)` or of an item assignment, in order.

    Args:
        node: the expression.
        conditions: the conditions that apply to the whole expression.
    """
    match node:
        case ast.IfExp(test=test, body=body, orelse=orelse):
            yield from split_expression(body, (*conditions, Condition(ast.unparse(test), True)))
            yield from split_expression(orelse, (*conditions, Condition(ast.unparse(test), False)))
        case ast.BoolOp(op=operator, values=[*first, last]):
            # The value of `a or b` may be either of them; the `a` of `a and b` is the value only if it has no entries.
            tests = tuple(Condition(ast.unparse(value), isinstance(operator, ast.And)) for value in first)
            for value in first if isinstance(operator, ast.Or) else ():
                yield from split_expression(value, conditions)
            yield from split_expression(last, (*conditions, *tests))
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            yield from split_expression(left, conditions)
            yield from split_expression(right, conditions)
        case ast.NamedExpr(value=value) | ast.Lambda(body=value):
            yield from split_expression(value, conditions)
        case ast.Dict(keys=keys, values=values):
            yield PlanPart(node, conditions, has_entries=True)
            for key, value in zip(keys, values, strict=True):
                if key is None:
                    yield from split_expression(value, conditions)
        case ast.DictComp():
            yield from _split_comprehension(node, conditions)
        case ast.Call():
            yield from _split_call(node, conditions)
        case ast.Constant(value=None) | ast.Name(id="dict"):
            return
        case _:
            yield PlanPart(node, conditions, can_hold_entries(node))


def iter_bindings(statement: ast.AST) -> Iterator[tuple[ast.expr, ast.expr]]:
    """Yield every target of an assignment with its value; tuples are unpacked."""
    match statement:
        case ast.Assign(targets=targets, value=value):
            for target in targets:
                if isinstance(target, (ast.Tuple, ast.List)) and isinstance(value, (ast.Tuple, ast.List)):
                    yield from zip(target.elts, value.elts, strict=False)
                else:
                    yield target, value
        case ast.AnnAssign(target=target, value=ast.expr() as value) | ast.NamedExpr(target=target, value=value):
            yield target, value


def has_plan_name(node: ast.AST) -> bool:
    """Return whether an expression names a plan, as in `self._tp_plan` or `getattr(x, "_tp_plan")`."""
    return any(True for part in ast.walk(node) for _ in iter_plan_names(part))


def is_plan_reference(node: ast.AST) -> bool:
    """Return whether an expression is a plan itself: `x.tp_plan`, `getattr(x, "_tp_plan")`, `vars(x)["_tp_plan"]`."""
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name) | ast.Subscript(slice=ast.Constant(value=str(name))):
            return plan_kind(name) is not None
        case ast.Call(func=ast.Name(id="getattr"), args=[_, ast.Constant(value=str(name)), *defaults]):
            return plan_kind(name) is not None and all(
                isinstance(default, (ast.Constant, ast.Dict)) or is_empty(default) or is_plan_reference(default)
                for default in defaults
            )
    return False


def is_empty(node: ast.AST) -> bool:
    """Return whether an expression is `None` or an empty container."""
    match node:
        case ast.Constant(value=None) | ast.Dict(keys=[]) | ast.List(elts=[]) | ast.Tuple(elts=[]):
            return True
        case ast.Call(func=ast.Name(id="dict" | "OrderedDict"), args=[], keywords=[]):
            return True
    return False


def find_renamed_plan(node: ast.AST) -> ast.expr | None:
    """Return the plan whose styles a comprehension copies under other keys, or None.

    Such a comprehension is `{f"{name}.{key}": style for key, style in plan.items()}`; a copy of the plan will do.
    """
    match node:
        case ast.DictComp(
            value=ast.Name(id=value),
            generators=[
                ast.comprehension(
                    target=ast.Tuple(elts=[ast.Name(), ast.Name(id=style)]),
                    iter=ast.Call(func=ast.Attribute(value=plan, attr="items"), args=[]),
                    ifs=[],
                )
            ],
        ) if value == style:
            match plan:
                case ast.Call(func=ast.Attribute(value=copied, attr="copy"), args=[]):
                    return copied
            return plan
    return None


def iter_plan_names(node: ast.AST) -> Iterator[str]:
    """Yield the plan name in a node itself, without its children."""
    match node:
        case ast.Attribute(attr=name) | ast.Name(id=name) | ast.Constant(value=str(name)):
            if plan_kind(name):
                yield name


def _split_call(call: ast.Call, conditions: tuple[Condition, ...]) -> Iterator[PlanPart]:
    name = call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")
    if name == "AttributeError":
        return
    if isinstance(call.func, ast.Attribute) and name == "copy" and not call.args:
        yield from split_expression(call.func.value, conditions)
        return
    arguments = [*call.args, *(keyword.value for keyword in call.keywords)]
    if name == "field":
        arguments = [keyword.value for keyword in call.keywords if keyword.arg in ("default", "default_factory")]
    elif can_hold_entries(call):
        yield PlanPart(call, conditions, has_entries=True)
        arguments = [*call.args, *(keyword.value for keyword in call.keywords if keyword.arg is None)]
        if name not in _WRAPPERS:
            return
    parts = [part for argument in arguments for part in split_expression(argument, conditions)]
    if name not in _WRAPPERS:
        # The result of an unknown function is not known, but displays among its arguments can be read.
        parts = [part for part in parts if part.has_entries] or [PlanPart(call, conditions)]
    yield from parts


def _split_comprehension(node: ast.DictComp, conditions: tuple[Condition, ...]) -> Iterator[PlanPart]:
    copied = _get_copied_plan(node)
    renamed = find_renamed_plan(node)
    if copied is None:
        is_renamed = renamed is not None and not any(part.has_entries for part in split_expression(renamed))
        yield PlanPart(node, conditions, can_hold_entries(node) and not is_renamed)
    else:
        is_filtered = any(generator.ifs for generator in node.generators)
        for part in split_expression(copied, conditions):
            yield replace(part, is_filtered=part.is_filtered or is_filtered)


def _get_copied_plan(node: ast.DictComp) -> ast.expr | None:
    """Return the plan whose entries a comprehension copies unchanged, `{k: v for k, v in PLAN.items()}`, or None."""
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


def walk_statements(statements: Iterable[ast.stmt]) -> Iterator[ast.AST]:
    """Yield statements and all nodes below them, in the order of `ast.walk`; see `iter_children` for what is not."""
    for statement in statements:
        nodes: list[ast.AST] = [statement]
        for node in nodes:
            nodes.extend(iter_children(node))
        yield from nodes


def iter_children(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the child nodes of a node, except for contexts such as `ast.Load`; twice as fast as `ast` does it."""
    for value in vars(node).values():
        if isinstance(value, list):
            yield from (item for item in value if isinstance(item, ast.AST))
        elif isinstance(value, ast.AST) and not isinstance(value, ast.expr_context):
            yield value
