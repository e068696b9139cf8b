"""A file walked for plans: its classes, and in them every statement that writes into a plan or takes out of one."""

from __future__ import annotations

import ast
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from codemods.blocks import blocks, leaves, own_expressions
from codemods.module import ClassPlans, Condition, Opaque, PlanLiteral, Removal, Unread, is_plan_attribute, plan_words
from codemods.names import Definitions, Function, local_plans
from codemods.pieces import bindings
from codemods.removals import removals
from codemods.sources import Source
from codemods.written import Target, written
from plans.plan import plan_kind

__all__ = ["Reader", "reader_of"]

Use = PlanLiteral | Removal | Unread

_ADDING = frozenset({"update", "setdefault", "__setitem__", "__ior__"})
"""Methods that put entries into a plan."""


@dataclass(frozen=True)
class Scope:
    """Where statements stand.

    Args:
        class_name: the class around, empty outside of classes.
        function: the function around, empty in a class body.
        conditions: those around in that function.
        loops: the `for` statements around in that function, innermost first.
        names: local names that stand for a plan, with its attribute.
    """

    class_name: str = ""
    function: str = ""
    conditions: tuple[Condition, ...] = ()
    loops: tuple[ast.For, ...] = ()
    names: Mapping[str, str] = field(default_factory=dict)

    def plan_of(self, node: ast.expr) -> str | None:
        """Return the plan that an expression stands for."""
        if isinstance(node, ast.Attribute):
            return node.attr if is_plan_attribute(node.attr) else None
        if isinstance(node, ast.Name):
            return self.names.get(node.id) or (node.id if is_plan_attribute(node.id) else None)
        return None


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

    def classes(self, statements: Sequence[ast.stmt], outer: str = "") -> Iterator[tuple[ClassPlans, list[Unread]]]:
        """Yield the classes among statements, however deep, under their qualified names, with what is unread."""
        for statement in statements:
            if isinstance(statement, ast.ClassDef):
                name = f"{outer}{statement.name}"
                bases = tuple(filter(None, map(_dotted, statement.bases)))
                if self._mentions(statement):
                    yield self._class(statement, name, bases)
                    yield from self.classes(statement.body, f"{name}.")
                else:
                    yield ClassPlans(name, bases), []
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
                inner = Scope(scope.class_name, statement.name, names={**scope.names, **local_plans(statement)})
                yield from self.uses(statement.body, inner)
                continue
            loops = (statement, *scope.loops) if isinstance(statement, ast.For) else scope.loops
            for block, around in blocks(statement):
                yield from self.uses(block, replace(scope, conditions=(*scope.conditions, *around), loops=loops))
            if isinstance(statement, ast.If) and leaves(statement.body):
                passed = Condition(ast.unparse(statement.test), False)
                scope = replace(scope, conditions=(*scope.conditions, passed))

    def _class(self, definition: ast.ClassDef, name: str, bases: tuple[str, ...]) -> tuple[ClassPlans, list[Unread]]:
        plans: dict[str, PlanLiteral | Opaque] = {}
        uses: list[Use] = []
        others: list[ast.stmt] = []
        for statement in definition.body:
            bound = list(_bound_plans(statement))
            others += [] if bound else [statement]
            for attribute, value in bound:
                target = Target(name, attribute, assigned=True)
                found = list(written(value, target, self.source, self.definitions))
                own = next((one for one in found if isinstance(one, PlanLiteral) and not one.conditions), None)
                plans[attribute] = replace(own, replaces=False) if own else Opaque(name, attribute, statement.lineno)
                uses += [one for one in found if one is not own]
        uses += self.uses(others, Scope(name))
        return _owner(name, bases, plans, uses)

    def outside(self, statements: Sequence[ast.stmt]) -> tuple[ClassPlans, list[Unread]]:
        """Return what stands outside of classes, as a class without a name."""
        return _owner("", (), {}, self.uses(statements, Scope()))

    def _mentions(self, node: ast.stmt) -> bool:
        following = bisect_left(self.lines, _first_line(node))
        return following < len(self.lines) and self.lines[following] <= (node.end_lineno or node.lineno)

    def _own_uses(self, statement: ast.stmt, scope: Scope) -> Iterator[Use]:
        """Yield what a statement itself, not the blocks in it, does to plans."""
        yield from removals(statement, scope.plan_of, scope.function, scope.conditions)
        seen: set[int] = set()
        for attribute, node, assigned in _written(statement, scope):
            if id(node) in seen:
                continue
            seen.update(map(id, ast.walk(node)))
            target = Target(scope.class_name, attribute, scope.function, scope.conditions, assigned, scope.names)
            yield from written(node, target, self.source, self.definitions)


def _owner(
    name: str, bases: tuple[str, ...], plans: Mapping[str, PlanLiteral | Opaque], uses: Iterable[Use]
) -> tuple[ClassPlans, list[Unread]]:
    found = list(uses)
    code = tuple(use for use in found if isinstance(use, PlanLiteral))
    removed = tuple(use for use in found if isinstance(use, Removal))
    return ClassPlans(name, bases, plans, code, removed), [use for use in found if isinstance(use, Unread)]


def reader_of(source: Source, statements: Sequence[ast.stmt]) -> Reader:
    """Return the reader of a file."""
    lines = tuple(bisect_right(source.line_offsets, start) for start, _ in plan_words(source.body))
    return Reader(source, lines, Definitions(statements))


def _written(statement: ast.stmt, scope: Scope) -> Iterator[tuple[str, ast.expr | ast.stmt, bool]]:
    """Yield plan, expression, and whether the expression becomes the plan."""
    for target, value in bindings(statement):
        if not isinstance(target, ast.Subscript) and (plan := scope.plan_of(target)):
            yield plan, value, not isinstance(target, ast.Name) or not scope.function
    match statement:
        case ast.Assign(targets=[ast.Subscript(value=holder, slice=key)], value=value):
            if plan := scope.plan_of(holder):
                yield plan, _looped(statement, key, value, scope.loops), False
            elif isinstance(key, ast.Constant) and isinstance(key.value, str) and plan_kind(key.value):
                yield key.value, value, True
        case ast.AugAssign(target=target, op=ast.BitOr(), value=value) if plan := scope.plan_of(target):
            yield plan, value, False
        case ast.Return(value=ast.expr() as value) if plan_kind(scope.function):
            yield scope.function, value, True
    for expression in own_expressions(statement):
        for node in ast.walk(expression):
            yield from _in_expression(node, scope)


def _in_expression(node: ast.AST, scope: Scope) -> Iterator[tuple[str, ast.expr, bool]]:
    match node:
        case ast.NamedExpr(target=target, value=value) if plan := scope.plan_of(target):
            yield plan, value, False
        case ast.Call(func=ast.Attribute(value=holder, attr=method)) if method in _ADDING and (
            plan := scope.plan_of(holder)
        ):
            yield plan, node, False
        case ast.Call(func=ast.Name(id="setattr"), args=[_, ast.Constant(value=str(plan)), value]) if plan_kind(plan):
            yield plan, value, True
            return
    for name, value in _named(node):
        if name and plan_kind(name):
            yield name, value, True


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
