"""Plan literals: the dict displays that classes assign to plan attributes."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from codemods.sources import Source, shown
from plans.errors import SourceError

__all__ = [
    "ClassPlans",
    "Entry",
    "Module",
    "Opaque",
    "PlanLiteral",
    "is_plan_attribute",
    "read_module",
    "read_statement",
]

_PLAN_ATTRIBUTE = re.compile(r"(?:base_model)?_(?:tp|sp|ep|tp_ep|sp_ep)_plan")


@dataclass(frozen=True)
class Entry:
    """One `"key": "style"` of a plan literal.

    Args:
        key: the plan key.
        style: the style name.
        line: where the style stands, counted from 1.
    """

    key: str
    style: str
    line: int


@dataclass(frozen=True)
class PlanLiteral:
    """A plan attribute assigned a dict display.

    Args:
        class_name: the class it belongs to.
        attribute: `base_model_tp_plan`.
        line: where the statement begins, counted from 1.
        start: the same as a place in the source's body.
        end: where the statement ends, exclusive.
        entries: those that are two string constants, in order.
    """

    class_name: str
    attribute: str
    line: int
    start: int
    end: int
    entries: tuple[Entry, ...]

    @cached_property
    def plan(self) -> Mapping[str, str]:
        """Key to style; of a key given twice the last counts, as in Python."""
        return {entry.key: entry.style for entry in self.entries}


@dataclass(frozen=True)
class Opaque:
    """A plan attribute assigned anything else: `None`, `AttributeError()`, a call, a name."""

    class_name: str
    attribute: str
    line: int


@dataclass(frozen=True)
class ClassPlans:
    """A class with the plans that its own body assigns.

    Args:
        name: of the class.
        bases: its base classes as written, dotted; a base that is computed is left out.
        plans: attribute name to what it was last assigned.
    """

    name: str
    bases: tuple[str, ...]
    plans: Mapping[str, PlanLiteral | Opaque]


@dataclass(frozen=True)
class Module:
    """What a file says of plans.

    Args:
        classes: by name.
        imports: names brought in by relative imports, each with the level and the module they come from.
    """

    classes: Mapping[str, ClassPlans]
    imports: Mapping[str, tuple[int, str]]


def is_plan_attribute(name: str) -> bool:
    """Say whether a class attribute of this name holds a plan."""
    return _PLAN_ATTRIBUTE.fullmatch(name) is not None


def read_module(source: Source) -> Module:
    """Read a file's classes with their plans, and where it imports names from.

    Raises:
        SourceError: the file does not parse.
    """
    statements = _parse(source).body
    return Module({found.name: found for found in _classes(source, statements)}, dict(_imports(statements)))


def read_statement(text: str) -> Mapping[str, str] | None:
    """Return the plan that one assignment's text assigns, None if it is not one assignment of a dict display."""
    match ast.parse(text).body:
        case [ast.Assign(value=ast.Dict() as value)] | [ast.AnnAssign(value=ast.Dict() as value)]:
            return {entry.key: entry.style for entry in _entries(value)}
    return None


def _parse(source: Source) -> ast.Module:
    try:
        return ast.parse(source.body)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = getattr(error, "lineno", None) or 1
        reason = getattr(error, "msg", None) or str(error)
        raise SourceError(
            f"{shown(source.path)}:{line}: does not parse: {reason}",
            hint="mend the file or leave it out",
            path=str(source.path),
            line=line,
        ) from error


def _imports(statements: Sequence[ast.stmt]) -> Iterator[tuple[str, tuple[int, str]]]:
    for statement in statements:
        if isinstance(statement, ast.ImportFrom) and statement.level and statement.module:
            for alias in statement.names:
                yield alias.asname or alias.name, (statement.level, statement.module)


def _classes(source: Source, statements: Sequence[ast.stmt]) -> Iterator[ClassPlans]:
    for statement in statements:
        if isinstance(statement, ast.ClassDef):
            plans = {plan.attribute: plan for plan in _plans(source, statement)}
            yield ClassPlans(statement.name, tuple(filter(None, map(_dotted, statement.bases))), plans)
            yield from _classes(source, statement.body)
        elif isinstance(statement, (ast.If, ast.Try)):
            yield from _classes(source, [*statement.body, *statement.orelse])


def _dotted(node: ast.expr) -> str | None:
    if isinstance(node, ast.Attribute):
        prefix = _dotted(node.value)
        return prefix and f"{prefix}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else None


def _plans(source: Source, owner: ast.ClassDef) -> Iterator[PlanLiteral | Opaque]:
    for statement in owner.body:
        match statement:
            case ast.Assign(targets=[ast.Name(id=name)], value=value) if is_plan_attribute(name):
                yield _plan(source, owner.name, name, statement, value)
            case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value) if is_plan_attribute(name):
                yield _plan(source, owner.name, name, statement, value)


def _plan(source: Source, owner: str, name: str, statement: ast.stmt, value: ast.expr) -> PlanLiteral | Opaque:
    if not isinstance(value, ast.Dict):
        return Opaque(owner, name, statement.lineno)
    assert statement.end_lineno is not None
    assert statement.end_col_offset is not None
    return PlanLiteral(
        owner,
        name,
        statement.lineno,
        source.offset(statement.lineno, statement.col_offset),
        source.offset(statement.end_lineno, statement.end_col_offset),
        tuple(_entries(value)),
    )


def _entries(value: ast.Dict) -> Iterator[Entry]:
    for pair in zip(value.keys, value.values, strict=True):
        match pair:
            case (ast.Constant(value=str(key)), ast.Constant(value=str(style), lineno=line)):
                yield Entry(key, style, line)
