"""A file walked for plans: its classes, and in them every statement that writes into a plan or takes out of one."""

from __future__ import annotations

import ast
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from codemods.files.sources import Source
from codemods.reading.blocks import blocks, leaves
from codemods.reading.module import ClassPlans, Condition, Hold, Opaque, PlanLiteral, Removal, Taken, Unread
from codemods.reading.names import Definitions, Function, dotted, given_parameters, local_plans
from codemods.reading.pieces import bindings
from codemods.reading.plan_names import is_plan_attribute, plan_words
from codemods.reading.removals import removals
from codemods.reading.scope import Scope
from codemods.reading.unaccounted import shared_plans, unaccounted
from codemods.reading.values import plan_values
from codemods.reading.written import Target, written

__all__ = ["Found", "Reader", "reader_of"]

_Use = PlanLiteral | Removal | Taken | Unread | Hold


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
                bases = tuple(filter(None, map(dotted, statement.bases)))
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

    def uses(self, statements: Sequence[ast.stmt], scope: Scope) -> Iterator[_Use]:
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
        uses: list[_Use] = []
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

    def _own_uses(self, statement: ast.stmt, scope: Scope) -> Iterator[_Use]:
        """Yield what a statement itself, not the blocks in it, does to plans."""
        yield from removals(statement, scope)
        yield from shared_plans(statement, scope)
        seen: set[int] = set()
        for (class_name, attribute), node, assigned in plan_values(statement, scope):
            if id(node) not in seen:
                seen.update(map(id, ast.walk(node)))
                yield from written(node, Target(class_name, attribute, scope, assigned), self.source, self.definitions)
        yield from unaccounted(statement, scope, self.source, seen)


def _found(owner: ClassPlans, uses: Iterable[_Use]) -> Found:
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
