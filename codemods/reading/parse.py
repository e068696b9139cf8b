"""A file walked for plans: its classes, and in them every statement that writes into a plan or takes out of one."""

from __future__ import annotations

import ast
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from codemods.files.sources import SourceFile, format_path
from codemods.reading.conditions import is_exiting, iter_blocks
from codemods.reading.expressions import iter_bindings
from codemods.reading.module import (
    ANY_KEY,
    ClassPlans,
    Condition,
    Conflict,
    Import,
    Module,
    Opaque,
    PlanLiteral,
    Reference,
    Removal,
    Unresolved,
)
from codemods.reading.names import Definitions, Function, find_free_parameters, find_local_plans, get_dotted_name
from codemods.reading.plan_literals import AssignmentTarget, read_assignment
from codemods.reading.scope import Scope, find_plan_mentions, is_plan_attribute
from codemods.reading.statements import find_plan_values, find_removals, find_shared_plans, find_unresolved_uses
from plans.decompose import find_group_key
from plans.errors import SourceError
from plans.plan import to_wildcard

__all__ = ["ParsedClass", "PlanParser", "create_parser", "merge_classes", "read_module"]


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


def merge_classes(parsed: Iterable[ParsedClass]) -> dict[str, ClassPlans]:
    """Return the classes of a file by name, each with all that the file says of its plans.

    Args:
        parsed: what was found class by class, and outside of classes.
    """
    parsed = list(parsed)
    classes = {one.class_plans.name: one.class_plans for one in parsed}
    if any(owner.code_literals or owner.removals or owner.references for owner in classes.values()):
        classes = {name: _merge_uses(owner, classes.values()) for name, owner in classes.items()}
    holds: dict[str, list[Conflict]] = defaultdict(list)
    for hold in [*_collect_conflicts(parsed), *_find_inherited_conflicts(classes)]:
        holds[hold.class_name].append(hold)
    return {
        name: replace(owner, conflicts=tuple(holds[name])) if name in holds else owner
        for name, owner in classes.items()
        if name or owner.code_literals or owner.removals
    }


def _merge_uses(owner: ClassPlans, everyone: Iterable[ClassPlans]) -> ClassPlans:
    """Take in what other code of the file does to a class's plans, and leave what is done to other classes to them."""
    names = {one.name for one in everyone}
    code = [one for other in everyone for one in other.code_literals if _is_owned_by(one, other, owner, names)]
    removed = [one for other in everyone for one in other.removals if _is_owned_by(one, other, owner, names)]
    taken = [one for other in everyone for one in other.references if _is_owned_by(one, other, owner, names)]
    return replace(owner, code_literals=tuple(code), removals=tuple(removed), references=tuple(taken))


def _is_owned_by(
    use: PlanLiteral | Removal | Reference, written_in: ClassPlans, owner: ClassPlans, names: Iterable[str]
) -> bool:
    return (use.class_name if use.class_name in names else written_in.name) == owner.name


def _collect_conflicts(parsed: Iterable[ParsedClass]) -> Iterator[Conflict]:
    for one in parsed:
        yield from one.conflicts
        for use in one.unresolved:
            if use.mentions_experts:
                yield Conflict(
                    use.class_name, use.attribute, None, f"line {use.line} gives the plan entries {use.reason}"
                )


def _find_inherited_conflicts(classes: Mapping[str, ClassPlans]) -> Iterator[Conflict]:
    """Yield holds for what code of a class changes in a plan that another class writes, a base or one that inherits."""
    for owner in classes.values():
        for base in _iter_bases(owner, classes):
            for attribute in _get_attributes(base):
                if attribute not in owner.plans:
                    yield from _find_change_conflicts(owner, base, attribute)
            for attribute in _get_attributes(owner):
                yield from _find_change_conflicts(base, owner, attribute)


def _find_change_conflicts(writer: ClassPlans, target: ClassPlans, attribute: str) -> Iterator[Conflict]:
    literals = [target.plans.get(attribute), *target.code_literals]
    written = {module for one in literals if isinstance(one, PlanLiteral) for module in _get_modules(one, attribute)}
    for literal in writer.code_literals:
        if not literal.replaces:
            for module in sorted(written & _get_modules(literal, attribute)):
                why = f"line {literal.line} writes it in {writer.name} too"
                yield Conflict(target.name, attribute, module, why)
                yield Conflict(writer.name, attribute, module, f"{target.name} writes it too")
    for removal in writer.removals:
        if removal.attribute == attribute and removal.key is not None:
            taken = None if removal.key == ANY_KEY else find_group_key(to_wildcard(removal.key))
            why = f"line {removal.line} takes entries out of it in {writer.name}"
            yield Conflict(target.name, attribute, taken, why)


def _get_attributes(owner: ClassPlans) -> dict[str, None]:
    return dict.fromkeys([*owner.plans, *(one.attribute for one in owner.code_literals)])


def _get_modules(literal: PlanLiteral, attribute: str) -> set[str]:
    return {find_group_key(entry.key) for entry in literal.entries} if literal.attribute == attribute else set()


def _iter_bases(owner: ClassPlans, classes: Mapping[str, ClassPlans]) -> Iterator[ClassPlans]:
    """Yield the bases of a class in its own file, however far up."""
    seen = {owner.name}
    waiting = list(owner.bases)
    while waiting:
        name = waiting.pop()
        if name in classes and name not in seen:
            seen.add(name)
            yield classes[name]
            waiting += classes[name].bases


_MODELS = ".models"


def read_module(source: SourceFile) -> Module:
    """Read a file's classes with their plans, and where it imports names from.

    Raises:
        SourceError: the file does not parse.
    """
    try:
        return _read_statements(source, _parse(source).body)
    except RecursionError as error:
        raise SourceError(
            f"{format_path(source.path)}: nested too deeply to be read", hint="leave it out", path=str(source.path)
        ) from error


def _read_statements(source: SourceFile, statements: Sequence[ast.stmt]) -> Module:
    reader = create_parser(source, statements)
    found = [*reader.parse_classes(statements), reader.parse_outside_classes(statements)]
    unread = sorted((use for one in found for use in one.unresolved), key=lambda use: use.line)
    imports = dict(_read_imports(statements))
    return Module(merge_classes(found), lambda: imports, tuple(unread))


def _parse(source: SourceFile) -> ast.Module:
    try:
        return ast.parse(source.body)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = getattr(error, "lineno", None) or 1
        reason = getattr(error, "msg", None) or str(error)
        raise SourceError(
            f"{format_path(source.path)}:{line}: does not parse: {reason}",
            hint="mend the file or leave it out",
            path=str(source.path),
            line=line,
        ) from error


def _read_imports(statements: Sequence[ast.stmt], *, nested: bool = False) -> Iterator[tuple[str, Import]]:
    """Yield the names that imports of a file bring in, in `try` and `if` too, the one that counts last.

    Of `import` statements and of nested ones only those are told that lead to a model.
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
