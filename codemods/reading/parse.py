"""Reading a parsed file: its classes, its imports, and every statement that writes into plans or removes from them."""

from __future__ import annotations

import ast
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from codemods.files.sources import SourceFile, format_path
from codemods.reading.accounting import Accountant
from codemods.reading.conflicts import ParsedClass, find_outward_conflicts, merge_classes
from codemods.reading.expressions import iter_bindings
from codemods.reading.local_names import (
    find_free_parameters,
    find_local_plans,
    find_object_plans,
    find_written_names,
)
from codemods.reading.module import (
    ClassPlans,
    Condition,
    Conflict,
    Import,
    Module,
    Opaque,
    PlanCopy,
    PlanLiteral,
    Reference,
    Removal,
    StyleSource,
    Unresolved,
)
from codemods.reading.names import Definitions, Function, get_dotted_name
from codemods.reading.plan_literals import AssignmentTarget, read_assignment
from codemods.reading.scope import Scope, find_plan_mentions, is_exiting, is_plan_attribute, iter_blocks
from codemods.reading.statements import find_plan_values, find_removals, find_shared_plans, find_unresolved_uses
from plans.errors import SourceError
from plans.plan import plan_kind

__all__ = [
    "PlanParser",
    "create_parser",
    "parse_statements",
    "read_module",
    "read_statements",
]


_Use = PlanLiteral | Removal | Reference | Unresolved | Conflict | PlanCopy


@dataclass(frozen=True)
class PlanParser:
    """Walks a file, but only into statements with a line that contains the name of a plan.

    Args:
        source: the file.
        lines: the lines that contain the name of a plan, in order.
        definitions: the definitions of the names in the file.
    """

    source: SourceFile
    lines: tuple[int, ...]
    definitions: Definitions

    def parse_classes(self, statements: Sequence[ast.stmt], outer: str = "") -> Iterator[ParsedClass]:
        """Yield the classes among statements and in their blocks, with qualified names."""
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
        """Yield what statements, and the blocks in them except for classes, write into plans or remove from them."""
        for statement in statements:
            if not (scope.aliases or plan_kind(scope.function) or self._has_mention(statement)):
                continue
            yield from self._parse_statement(statement, scope)
            if isinstance(statement, ast.ClassDef):
                continue
            if isinstance(statement, Function):
                yield from self.parse_uses(statement.body, _enter_function(statement, scope))
                continue
            loops = (statement, *scope.loops) if isinstance(statement, ast.For) else scope.loops
            for block, added in iter_blocks(statement):
                yield from self.parse_uses(block, replace(scope, conditions=(*scope.conditions, *added), loops=loops))
            if isinstance(statement, ast.If) and is_exiting(statement.body):
                negated = Condition(ast.unparse(statement.test), False)
                scope = replace(scope, conditions=(*scope.conditions, negated))

    def _parse_class(self, definition: ast.ClassDef, name: str, bases: tuple[str, ...]) -> ParsedClass:
        scope = self._create_scope(name)
        plans: dict[str, PlanLiteral | Opaque] = {}
        uses: list[_Use] = []
        others: list[ast.stmt] = []
        for statement in definition.body:
            assigned = list(_iter_assigned_plans(statement))
            others += [] if assigned else [statement]
            uses += find_shared_plans(statement, scope)
            for attribute, value in assigned:
                target = AssignmentTarget(name, attribute, scope, "assigned")
                written = list(read_assignment(value, target, self.source, self.definitions))
                plan = next((use for use in written if isinstance(use, PlanLiteral) and not use.conditions), None)
                plans[attribute] = replace(plan, replaces=False) if plan else Opaque(name, attribute, statement.lineno)
                uses += [use for use in written if use is not plan]
        uses += self.parse_uses(others, scope)
        return _build_parsed_class(ClassPlans(name, bases, plans), uses)

    def parse_outside_classes(self, statements: Sequence[ast.stmt]) -> ParsedClass:
        """Return the code outside of classes as a class without a name."""
        return _build_parsed_class(ClassPlans(""), self.parse_uses(statements, self._create_scope("")))

    def _create_scope(self, class_name: str) -> Scope:
        return Scope(class_name, classes=self.definitions.classes, imported=self.definitions.imported)

    def _has_mention(self, node: ast.stmt) -> bool:
        index = bisect_left(self.lines, _get_first_line(node))
        return index < len(self.lines) and self.lines[index] <= (node.end_lineno or node.lineno)

    def _parse_statement(self, statement: ast.stmt, scope: Scope) -> Iterator[_Use]:
        """Yield what a statement itself, without the blocks in it, does to plans."""
        yield from find_removals(statement, scope)
        yield from find_shared_plans(statement, scope)
        read_ids: set[int] = set()
        for (class_name, attribute), node, kind in find_plan_values(statement, scope):
            if id(node) not in read_ids:
                read_ids.update(map(id, ast.walk(node)))
                target = AssignmentTarget(class_name, attribute, scope, kind)
                yield from read_assignment(node, target, self.source, self.definitions)
        yield from find_unresolved_uses(statement, scope, self.source, read_ids)


def _build_parsed_class(owner: ClassPlans, uses: Iterable[_Use]) -> ParsedClass:
    uses = list(uses)
    return ParsedClass(
        replace(
            owner,
            code_literals=tuple(use for use in uses if isinstance(use, PlanLiteral)),
            removals=tuple(use for use in uses if isinstance(use, Removal)),
            references=tuple(use for use in uses if isinstance(use, Reference)),
        ),
        tuple(use for use in uses if isinstance(use, Unresolved)),
        tuple(use for use in uses if isinstance(use, Conflict)),
        tuple(use for use in uses if isinstance(use, PlanCopy)),
    )


def _enter_function(function: Function, scope: Scope) -> Scope:
    return Scope(
        scope.class_name,
        function.name,
        aliases={**scope.aliases, **find_local_plans(function)},
        written_names=scope.written_names | find_written_names(function),
        free_parameters=find_free_parameters(function),
        object_plans=find_object_plans(function),
        classes=scope.classes,
        imported=scope.imported,
    )


def create_parser(source: SourceFile, statements: Sequence[ast.stmt]) -> PlanParser:
    """Return the parser of a file with the given statements."""
    lines = tuple(bisect_right(source.line_offsets, start) for start, _ in find_plan_mentions(source.body))
    return PlanParser(source, lines, Definitions(statements))


def _iter_assigned_plans(statement: ast.stmt) -> Iterator[tuple[str, ast.expr]]:
    """Yield the plans that a statement of a class body assigns; of several names for one value, the first."""
    seen: list[ast.expr] = []
    for target, value in iter_bindings(statement):
        if isinstance(target, ast.Name) and is_plan_attribute(target.id) and value not in seen:
            seen.append(value)
            yield target.id, value


def _get_first_line(node: ast.stmt) -> int:
    decorators: Sequence[ast.expr] = getattr(node, "decorator_list", ())
    return min([node.lineno, *(decorator.lineno for decorator in decorators)])


_MODELS = ".models"


def read_module(source: SourceFile) -> Module:
    """Return the classes of a file with their plans, and its imports.

    Raises:
        SourceError: the file cannot be parsed.
    """
    return read_statements(source, parse_statements(source))


def read_statements(source: SourceFile, statements: Sequence[ast.stmt]) -> Module:
    """Return the classes of a parsed file with their plans, and its imports.

    Args:
        source: the file.
        statements: the statements that it consists of.

    Raises:
        SourceError: the file is nested too deeply.
    """
    try:
        return _read_statements(source, statements)
    except RecursionError as error:
        raise SourceError(
            f"{format_path(source.path)}: nested too deeply to be read",
            hint="simplify its code, or leave it out",
            path=str(source.path),
        ) from error


def _read_statements(source: SourceFile, statements: Sequence[ast.stmt]) -> Module:
    parser = create_parser(source, statements)
    parsed = [*parser.parse_classes(statements), parser.parse_outside_classes(statements)]
    style_sources: tuple[StyleSource, ...] = ()
    if len(parser.lines) > sum(map(_is_plain_plan, _iter_class_bodies(statements))):
        accountant = Accountant(source, parser.definitions)
        parsed = _add_unread_uses(parsed, accountant.find_unread_uses())
        style_sources = tuple(accountant.find_style_sources())
    unresolved = sorted((use for definition in parsed for use in definition.unresolved), key=lambda use: use.line)
    imports = dict(_read_imports(statements))
    return Module(
        merge_classes(parsed),
        lambda: imports,
        tuple(unresolved),
        tuple(find_outward_conflicts(parsed)),
        tuple(copy for definition in parsed for copy in definition.copies),
        style_sources,
    )


def _iter_class_bodies(statements: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    return (inner for statement in statements if isinstance(statement, ast.ClassDef) for inner in statement.body)


def _is_plain_plan(statement: ast.stmt) -> bool:
    """Return whether a statement of a class body does nothing but assign a plan that is written out, or none."""
    match statement:
        case (
            ast.Assign(targets=[ast.Name(id=name)], value=value)
            | ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value)
        ) if is_plan_attribute(name):
            match value:
                case ast.Dict(keys=keys, values=values):
                    return all(isinstance(part, ast.Constant) for part in (*keys, *values))
                case ast.Constant(value=None) | ast.Call(func=ast.Name(id="AttributeError"), args=[], keywords=[]):
                    return True
    return False


def _add_unread_uses(parsed: Iterable[ParsedClass], uses: Iterable[Unresolved | Conflict]) -> list[ParsedClass]:
    """Add uses to the classes of a file, each once: a statement that was read may be among them.

    Uses of classes that are not among those parsed belong to the code outside of classes, which is last.
    """
    *classes, outside = parsed
    known = {(use.line, use.attribute) for one in (*classes, outside) for use in one.unresolved}
    extra: dict[str, list[Unresolved]] = defaultdict(list)
    conflicts: list[Conflict] = []
    names = {one.class_plans.name for one in classes}
    for use in dict.fromkeys(uses):
        if isinstance(use, Conflict):
            conflicts.append(use)
        elif (use.line, use.attribute) in known:
            reason = f"gives the plan entries {use.reason}"
            conflicts.append(Conflict(use.owner or use.class_name, use.attribute, None, use.line, reason, use.function))
        else:
            extra[use.class_name if use.class_name in names else ""].append(use)
    classes = [replace(one, unresolved=(*one.unresolved, *extra[one.class_plans.name])) for one in classes]
    unresolved, conflicting = (*outside.unresolved, *extra[""]), (*outside.conflicts, *conflicts)
    return [*classes, replace(outside, unresolved=unresolved, conflicts=conflicting)]


def parse_statements(source: SourceFile) -> Sequence[ast.stmt]:
    """Return the statements of a file.

    Raises:
        SourceError: the file cannot be parsed.
    """
    try:
        return ast.parse(source.body).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = getattr(error, "lineno", None) or 1
        reason = getattr(error, "msg", None) or str(error)
        raise SourceError(
            f"{format_path(source.path)}:{line}: does not parse: {reason}",
            hint="correct its syntax, or leave it out",
            path=str(source.path),
            line=line,
        ) from error


def _read_imports(statements: Sequence[ast.stmt], *, nested: bool = False) -> Iterator[tuple[str, Import]]:
    """Yield the names that the imports of a file bind, also those in `try`, `if` and `with`; the last one counts.

    Of `import` statements and of nested imports, only those that may lead to a model are included.
    """
    for statement in statements:
        match statement:
            case ast.ImportFrom(level=level, names=names):
                module = statement.module or ""
                if not nested or level in (1, 2) or _MODELS in f"{'.' * level}{module}":
                    yield from ((alias.asname or alias.name, Import(level, module, alias.name)) for alias in names)
            case ast.Import(names=names):
                named = [alias for alias in names if alias.asname and _MODELS in alias.name]
                yield from ((alias.asname or "", Import(0, alias.name, "")) for alias in named)
            case ast.If() | ast.Try() | ast.With():
                for block, _ in reversed(list(iter_blocks(statement))):
                    yield from _read_imports(block, nested=True)
