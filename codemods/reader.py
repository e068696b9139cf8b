"""A file walked for plans: its classes, and in them every statement that writes into a plan or takes out of one."""

from __future__ import annotations

import ast
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from codemods.blocks import blocks, leaves, own_expressions
from codemods.module import (
    ClassPlans,
    Condition,
    Hold,
    Opaque,
    PlanLiteral,
    Removal,
    Taken,
    Unread,
    is_plan_attribute,
    plan_words,
)
from codemods.names import Definitions, Function, given_parameters, local_plans
from codemods.pieces import bindings
from codemods.removals import removals
from codemods.scope import Scope
from codemods.sources import Source
from codemods.unaccounted import shared_plans, unaccounted
from codemods.written import Target, written
from plans.plan import plan_kind

__all__ = ["Found", "Reader", "reader_of"]

Use = PlanLiteral | Removal | Taken | Unread | Hold

_ADDING = frozenset({"update", "setdefault", "__setitem__", "__ior__"})
"""Methods that put entries into a plan."""


@dataclass(frozen=True)
class Found:
    """What was found in a class.

    Args:
        owner: the class.
        unread: what it puts into plans that cannot be read.
        holds: what it does that keeps plans as they are.
    """

    owner: ClassPlans
    unread: tuple[Unread, ...] = ()
    holds: tuple[Hold, ...] = ()


@dataclass(frozen=True)
class Reader:
    """Walks a file, into those statements only that a line with a plan's name lies in.

    Args:
        source: the file.
        lines: the lines with a plan's name, in order.
        definitions: of the file's names.
    """

    source: Source
    lines: tuple[int, ...]
    definitions: Definitions

    def classes(self, statements: Sequence[ast.stmt], outer: str = "") -> Iterator[Found]:
        """Yield the classes among statements, however deep, under their qualified names, with what is said of them."""
        for statement in statements:
            if isinstance(statement, ast.ClassDef):
                name = f"{outer}{statement.name}"
                bases = tuple(filter(None, map(_dotted, statement.bases)))
                if self._mentions(statement):
                    yield self._class(statement, name, bases)
                    yield from self.classes(statement.body, f"{name}.")
                else:
                    yield Found(ClassPlans(name, bases))
            elif isinstance(statement, Function):
                if self._mentions(statement):
                    yield from self.classes(statement.body, f"{outer}{statement.name}.<locals>.")
            else:
                for block, _ in blocks(statement):
                    yield from self.classes(block, outer)

    def uses(self, statements: Sequence[ast.stmt], scope: Scope) -> Iterator[Use]:
        """Yield what statements and the blocks in them write into plans or take out of them, classes left out."""
        for statement in statements:
            if not (scope.names or self._mentions(statement)):
                continue
            yield from self._own_uses(statement, scope)
            if isinstance(statement, ast.ClassDef):
                continue
            if isinstance(statement, Function):
                yield from self.uses(statement.body, _inside(statement, scope))
                continue
            loops = (statement, *scope.loops) if isinstance(statement, ast.For) else scope.loops
            for block, around in blocks(statement):
                yield from self.uses(block, replace(scope, conditions=(*scope.conditions, *around), loops=loops))
            if isinstance(statement, ast.If) and leaves(statement.body):
                passed = Condition(ast.unparse(statement.test), False)
                scope = replace(scope, conditions=(*scope.conditions, passed))

    def _class(self, definition: ast.ClassDef, name: str, bases: tuple[str, ...]) -> Found:
        scope = Scope(name, classes=self.definitions.classes)
        plans: dict[str, PlanLiteral | Opaque] = {}
        uses: list[Use] = []
        others: list[ast.stmt] = []
        for statement in definition.body:
            bound = list(_bound_plans(statement))
            others += [] if bound else [statement]
            uses += shared_plans(statement, scope)
            for attribute, value in bound:
                found = list(
                    written(value, Target(name, attribute, scope, assigned=True), self.source, self.definitions)
                )
                own = next((one for one in found if isinstance(one, PlanLiteral) and not one.conditions), None)
                plans[attribute] = replace(own, replaces=False) if own else Opaque(name, attribute, statement.lineno)
                uses += [one for one in found if one is not own]
        uses += self.uses(others, scope)
        return _found(ClassPlans(name, bases, plans), uses)

    def outside(self, statements: Sequence[ast.stmt]) -> Found:
        """Return what stands outside of classes, as a class without a name."""
        return _found(ClassPlans(""), self.uses(statements, Scope(classes=self.definitions.classes)))

    def _mentions(self, node: ast.stmt) -> bool:
        following = bisect_left(self.lines, _first_line(node))
        return following < len(self.lines) and self.lines[following] <= (node.end_lineno or node.lineno)

    def _own_uses(self, statement: ast.stmt, scope: Scope) -> Iterator[Use]:
        """Yield what a statement itself, not the blocks in it, does to plans."""
        yield from removals(statement, scope)
        yield from shared_plans(statement, scope)
        seen: set[int] = set()
        for (class_name, attribute), node, assigned in _written(statement, scope):
            if id(node) not in seen:
                seen.update(map(id, ast.walk(node)))
                yield from written(node, Target(class_name, attribute, scope, assigned), self.source, self.definitions)
        yield from unaccounted(statement, scope, self.source, seen)


def _found(owner: ClassPlans, uses: Iterable[Use]) -> Found:
    found = list(uses)
    code = tuple(use for use in found if isinstance(use, PlanLiteral))
    removed = tuple(use for use in found if isinstance(use, Removal))
    return Found(
        replace(owner, code=code, removals=removed, taken=tuple(use for use in found if isinstance(use, Taken))),
        tuple(use for use in found if isinstance(use, Unread)),
        tuple(use for use in found if isinstance(use, Hold)),
    )


def _inside(function: Function, scope: Scope) -> Scope:
    return Scope(
        scope.class_name,
        function.name,
        names={**scope.names, **local_plans(function)},
        given=given_parameters(function),
        classes=scope.classes,
    )


def reader_of(source: Source, statements: Sequence[ast.stmt]) -> Reader:
    """Return the reader of a file."""
    lines = tuple(bisect_right(source.line_offsets, start) for start, _ in plan_words(source.body))
    return Reader(source, lines, Definitions(statements))


_PlanOf = tuple[str, str]
"""A class and its plan."""


def _written(statement: ast.stmt, scope: Scope) -> Iterator[tuple[_PlanOf, ast.expr | ast.stmt, bool]]:
    """Yield plan, expression, and whether the expression becomes the plan."""
    for target, value in bindings(statement):
        if not isinstance(target, ast.Subscript) and (plan := _plan(target, scope)):
            yield plan, value, not isinstance(target, ast.Name) or not scope.function
    match statement:
        case ast.Assign(targets=[ast.Subscript(value=holder, slice=key)], value=value):
            if plan := _plan(holder, scope):
                yield plan, _looped(statement, key, value, scope.loops), False
            elif isinstance(key, ast.Constant) and isinstance(key.value, str) and plan_kind(key.value):
                yield (scope.class_name, key.value), value, True
        case ast.AugAssign(target=target, op=ast.BitOr(), value=value) if plan := _plan(target, scope):
            yield plan, value, False
        case ast.Return(value=ast.expr() as value) if plan_kind(scope.function):
            yield (scope.class_name, scope.function), value, True
    for expression in own_expressions(statement):
        for node in ast.walk(expression):
            yield from _in_expression(node, scope)


def _plan(node: ast.expr, scope: Scope) -> _PlanOf | None:
    plan = scope.plan_of(node)
    return (scope.class_of(node), plan) if plan else None


def _in_expression(node: ast.AST, scope: Scope) -> Iterator[tuple[_PlanOf, ast.expr, bool]]:
    match node:
        case ast.NamedExpr(target=target, value=value) if plan := _plan(target, scope):
            yield plan, value, False
        case ast.Call(func=ast.Attribute(value=holder, attr=method)) if method in _ADDING and (
            plan := _plan(holder, scope)
        ):
            yield plan, node, False
        case ast.Call(func=ast.Name(id="setattr"), args=[_, ast.Constant(value=str(name)), value]) if plan_kind(name):
            yield (scope.class_name, name), value, True
            return
    for beside, value in _named(node):
        if beside and plan_kind(beside):
            yield (scope.class_name, beside), value, True


def _named(node: ast.AST) -> Iterator[tuple[str | None, ast.expr]]:
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


def _looped(statement: ast.Assign, key: ast.expr, value: ast.expr, loops: Sequence[ast.For]) -> ast.stmt | ast.expr:
    """Return an item assignment, or where its key is a loop's own the comprehension that says the same."""
    for loop in loops:
        if isinstance(key, ast.Name) and key.id in {
            part.id for part in ast.walk(loop.target) if isinstance(part, ast.Name)
        }:
            over = ast.comprehension(target=loop.target, iter=loop.iter, ifs=[], is_async=0)
            return ast.copy_location(ast.DictComp(key=key, value=value, generators=[over]), statement)
    return statement


def _bound_plans(statement: ast.stmt) -> Iterator[tuple[str, ast.expr]]:
    """Yield the plans that a statement of a class body assigns; of several names for one value the first."""
    seen: list[ast.expr] = []
    for target, value in bindings(statement):
        if isinstance(target, ast.Name) and is_plan_attribute(target.id) and value not in seen:
            seen.append(value)
            yield target.id, value


def _first_line(node: ast.stmt) -> int:
    decorators: Sequence[ast.expr] = getattr(node, "decorator_list", ())
    return min([node.lineno, *(decorator.lineno for decorator in decorators)])


def _dotted(node: ast.expr) -> str | None:
    if isinstance(node, ast.Attribute):
        prefix = _dotted(node.value)
        return prefix and f"{prefix}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else None
