"""A file walked for plans: its classes, and in them every statement that writes into a plan or takes out of one."""

from __future__ import annotations

import ast
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from codemods.files.sources import SourceFile
from codemods.reading.blocks import is_exiting, iter_blocks
from codemods.reading.module import ClassPlans, Condition, Conflict, Opaque, PlanLiteral, Reference, Removal, Unresolved
from codemods.reading.names import Definitions, Function, find_free_parameters, find_local_plans, get_dotted_name
from codemods.reading.pieces import iter_bindings
from codemods.reading.plan_names import find_plan_mentions, is_plan_attribute
from codemods.reading.removals import find_removals
from codemods.reading.scope import Scope
from codemods.reading.unaccounted import find_shared_plans, find_unresolved_uses
from codemods.reading.values import find_plan_values
from codemods.reading.written import AssignmentTarget, read_assignment

__all__ = ["ParsedClass", "PlanParser", "create_parser"]

_Use = PlanLiteral | Removal | Reference | Unresolved | Conflict


@dataclass(frozen=True)
class ParsedClass:
    """What was found in a class.

    Args:
        class_plans: the class.
        unresolved: what it puts into plans that cannot be read.
        conflicts: what it does that keeps plans as they are.
    """

    class_plans: ClassPlans
    unresolved: tuple[Unresolved, ...] = ()
    conflicts: tuple[Conflict, ...] = ()


@dataclass(frozen=True)
class PlanParser:
    """Walks a file, into those statements only that a line with a plan's name lies in.

    Args:
        source: the file.
        lines: the lines with a plan's name, in order.
        definitions: of the file's names.
    """

    source: SourceFile
    lines: tuple[int, ...]
    definitions: Definitions

    def parse_classes(self, statements: Sequence[ast.stmt], outer: str = "") -> Iterator[ParsedClass]:
        """Yield the classes among statements, however deep, under their qualified names, with what is said of them."""
        for statement in statements:
            if isinstance(statement, ast.ClassDef):
                name = f"{outer}{statement.name}"
                bases = tuple(filter(None, map(get_dotted_name, statement.bases)))
                if self._has_mention(statement):
                    yield self._parse_class(statement, name, bases)
                    yield from self.parse_classes(statement.body, f"{name}.")
                else:
                    yield ParsedClass(ClassPlans(name, bases))
            elif isinstance(statement, Function):
                if self._has_mention(statement):
                    yield from self.parse_classes(statement.body, f"{outer}{statement.name}.<locals>.")
            else:
                for block, _ in iter_blocks(statement):
                    yield from self.parse_classes(block, outer)

    def parse_uses(self, statements: Sequence[ast.stmt], scope: Scope) -> Iterator[_Use]:
        """Yield what statements and the blocks in them write into plans or take out of them, classes left out."""
        for statement in statements:
            if not (scope.aliases or self._has_mention(statement)):
                continue
            yield from self._parse_statement(statement, scope)
            if isinstance(statement, ast.ClassDef):
                continue
            if isinstance(statement, Function):
                yield from self.parse_uses(statement.body, _enter_function(statement, scope))
                continue
            loops = (statement, *scope.loops) if isinstance(statement, ast.For) else scope.loops
            for block, around in iter_blocks(statement):
                yield from self.parse_uses(block, replace(scope, conditions=(*scope.conditions, *around), loops=loops))
            if isinstance(statement, ast.If) and is_exiting(statement.body):
                passed = Condition(ast.unparse(statement.test), False)
                scope = replace(scope, conditions=(*scope.conditions, passed))

    def _parse_class(self, definition: ast.ClassDef, name: str, bases: tuple[str, ...]) -> ParsedClass:
        scope = Scope(name, classes=self.definitions.classes)
        plans: dict[str, PlanLiteral | Opaque] = {}
        uses: list[_Use] = []
        others: list[ast.stmt] = []
        for statement in definition.body:
            bound = list(_iter_assigned_plans(statement))
            others += [] if bound else [statement]
            uses += find_shared_plans(statement, scope)
            for attribute, value in bound:
                found = list(
                    read_assignment(
                        value, AssignmentTarget(name, attribute, scope, is_assigned=True), self.source, self.definitions
                    )
                )
                own = next((one for one in found if isinstance(one, PlanLiteral) and not one.conditions), None)
                plans[attribute] = replace(own, replaces=False) if own else Opaque(name, attribute, statement.lineno)
                uses += [one for one in found if one is not own]
        uses += self.parse_uses(others, scope)
        return _build_parsed_class(ClassPlans(name, bases, plans), uses)

    def parse_outside_classes(self, statements: Sequence[ast.stmt]) -> ParsedClass:
        """Return what stands outside of classes, as a class without a name."""
        return _build_parsed_class(ClassPlans(""), self.parse_uses(statements, Scope(classes=self.definitions.classes)))

    def _has_mention(self, node: ast.stmt) -> bool:
        following = bisect_left(self.lines, _get_first_line(node))
        return following < len(self.lines) and self.lines[following] <= (node.end_lineno or node.lineno)

    def _parse_statement(self, statement: ast.stmt, scope: Scope) -> Iterator[_Use]:
        """Yield what a statement itself, not the blocks in it, does to plans."""
        yield from find_removals(statement, scope)
        yield from find_shared_plans(statement, scope)
        seen: set[int] = set()
        for (class_name, attribute), node, assigned in find_plan_values(statement, scope):
            if id(node) not in seen:
                seen.update(map(id, ast.walk(node)))
                yield from read_assignment(
                    node, AssignmentTarget(class_name, attribute, scope, assigned), self.source, self.definitions
                )
        yield from find_unresolved_uses(statement, scope, self.source, seen)


def _build_parsed_class(owner: ClassPlans, uses: Iterable[_Use]) -> ParsedClass:
    found = list(uses)
    code = tuple(use for use in found if isinstance(use, PlanLiteral))
    removed = tuple(use for use in found if isinstance(use, Removal))
    return ParsedClass(
        replace(
            owner,
            code_literals=code,
            removals=removed,
            references=tuple(use for use in found if isinstance(use, Reference)),
        ),
        tuple(use for use in found if isinstance(use, Unresolved)),
        tuple(use for use in found if isinstance(use, Conflict)),
    )


def _enter_function(function: Function, scope: Scope) -> Scope:
    return Scope(
        scope.class_name,
        function.name,
        aliases={**scope.aliases, **find_local_plans(function)},
        free_parameters=find_free_parameters(function),
        classes=scope.classes,
    )


def create_parser(source: SourceFile, statements: Sequence[ast.stmt]) -> PlanParser:
    """Return the reader of a file."""
    lines = tuple(bisect_right(source.line_offsets, start) for start, _ in find_plan_mentions(source.body))
    return PlanParser(source, lines, Definitions(statements))


def _iter_assigned_plans(statement: ast.stmt) -> Iterator[tuple[str, ast.expr]]:
    """Yield the plans that a statement of a class body assigns; of several names for one value the first."""
    seen: list[ast.expr] = []
    for target, value in iter_bindings(statement):
        if isinstance(target, ast.Name) and is_plan_attribute(target.id) and value not in seen:
            seen.append(value)
            yield target.id, value


def _get_first_line(node: ast.stmt) -> int:
    decorators: Sequence[ast.expr] = getattr(node, "decorator_list", ())
    return min([node.lineno, *(decorator.lineno for decorator in decorators)])
