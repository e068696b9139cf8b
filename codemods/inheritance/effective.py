"""Effective plans: what every class's plans hold, inherited entries included, worked out from source alone.

Classes inherit as Python's do, across files. A plan's own value replaces an inherited one whole. What code makes of a
plan in a function, or under a condition, is a plan of its own here, with an entry for each that it adds or takes out;
classes inherit it with the function. What a plan takes over from constants and other classes' plans is in it too; of
what cannot be followed there is one entry, `UNRESOLVED`, that says what it is made of.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from operator import itemgetter
from pathlib import Path, PurePath

from codemods.inheritance.class_graph import Ancestor, ClassGraph, SourceLookup
from codemods.inheritance.lookup import NameLookup
from codemods.reading.module import Condition, PlanLiteral, Reference, Removal
from codemods.reading.names import get_dotted_name, parse_expression
from codemods.reading.scope import is_plan_attribute
from plans.errors import SourceError

__all__ = [
    "EVERY_KEY",
    "REMOVED",
    "UNRESOLVED",
    "EffectiveEntry",
    "EffectivePlans",
    "PlanBranch",
    "PlanVariant",
    "file_kind",
]

REMOVED = "removed by code"
"""Stands for the style of an entry that code takes out of a plan; no dialect has a style of that name."""

EVERY_KEY = "*"
"""Stands for the keys of a plan that code empties or replaces."""

UNRESOLVED = "(unread)"
"""Stands for the keys that a plan gets from what nobody here can read."""

PlanBranch = tuple[str, str, tuple[Condition, ...]]
"""Which plan, in which function and under which conditions; a class body is no function."""

_Change = PlanLiteral | Removal | Reference
_Write = tuple[PlanBranch, str, "EffectiveEntry"]
"""What is written: the plan, the key and the entry."""

_SELF_NAMES = ("self", "cls", "self.__class__")
_PARENT = "super()"

_MODEL_FILE = re.compile(r"(configuration|modeling)_\w+\.py")


@dataclass(frozen=True)
class PlanVariant:
    """Which plan of which class.

    Args:
        path: the class's file.
        class_name: the class.
        plan: the attribute; of what code adds, with the function and the conditions around it.
        branch: the same, in parts.
    """

    path: Path
    class_name: str
    plan: str
    branch: PlanBranch = field(default=("", "", ()), compare=False)


@dataclass(frozen=True)
class EffectiveEntry:
    """One entry of an effective plan.

    Args:
        style: None where it is computed; `REMOVED` where code takes it out.
        path: the file that it is written in, not always the class's own.
        line: where it stands there, counted from 1.
        provenance: all that a computed style, or what is under `UNRESOLVED`, is made of.
    """

    style: str | None
    path: Path
    line: int
    provenance: str = ""


@dataclass
class EffectivePlans:
    """The effective plans of a set of files, each parsed at most once.

    Args:
        get_source: gives the files.
    """

    get_source: SourceLookup
    _in_progress: set[tuple[Path, str, str]] = field(default_factory=set)

    def compute_file_plans(self, path: Path) -> dict[PlanVariant, Mapping[str, EffectiveEntry]]:
        """Return every plan of a file's classes by place, each from key to entry; of a file that is gone, none.

        Raises:
            SourceError: the file, or one that it inherits from, does not parse or inherits without end.
        """
        try:
            return {
                PlanVariant(path, name, _format_label(*written), written): plan
                for name in self.list_classes(path)
                for written, plan in self._compute_plans(self._graph.mro(path, name)).items()
            }
        except RecursionError as error:
            self._graph.clear()
            raise SourceError(
                f"{path}: its classes inherit too deeply to follow", hint="leave it out", path=str(path)
            ) from error

    def list_classes(self, path: Path) -> tuple[str, ...]:
        """Return the names of a file's classes; of a file that is gone, none."""
        module = self._graph.module(path)
        return tuple(module.classes) if module else ()

    @cached_property
    def _graph(self) -> ClassGraph:
        return ClassGraph(self.get_source)

    @cached_property
    def _lookup(self) -> NameLookup:
        return NameLookup(self._graph)

    def _compute_plans(self, mro: Iterable[Ancestor]) -> dict[PlanBranch, dict[str, EffectiveEntry]]:
        """Return the plans of a class: what class bodies assign, and what functions and conditions make of it."""
        plans: dict[PlanBranch, dict[str, EffectiveEntry]] = {}
        for file, owner in reversed(tuple(mro)):
            for attribute in owner.plans:
                plans = {written: one for written, one in plans.items() if written[:2] != (attribute, "")}
                plans[attribute, "", ()] = {}
            own = (plan for plan in owner.plans.values() if isinstance(plan, PlanLiteral))
            changes: list[_Change] = [
                *own,
                *owner.code_literals,
                *owner.removals,
                *owner.references,
                *self._lookup.find_unresolved_references(file, owner),
            ]
            for written, key, entry in self._collect_writes(file, owner.name, changes):
                plan = plans.setdefault(written, {})
                plan[key] = _merge_provenance(plan[key], entry) if key == UNRESOLVED and key in plan else entry
        return plans

    def _collect_writes(self, path: Path, scope: str, changes: Iterable[_Change]) -> Iterator[_Write]:
        """Yield what is written into which plan, in the order of the text."""
        placed = [write for change in changes for write in self._expand_change(path, scope, change)]
        return ((written, key, entry) for _, written, key, entry in sorted(placed, key=itemgetter(0)))

    def _expand_change(
        self, path: Path, scope: str, change: _Change
    ) -> Iterator[tuple[int, PlanBranch, str, EffectiveEntry]]:
        """Yield what one change writes: a place to sort by, the plan, the key and the entry."""
        written = change.attribute, change.function, change.conditions
        start = self._find_offset(path, change.line)
        if isinstance(change, Removal):
            yield start, written, change.key or EVERY_KEY, EffectiveEntry(REMOVED, path, change.line)
            return
        if change.replaces and change.function:
            yield start, written, EVERY_KEY, EffectiveEntry(REMOVED, path, change.line)
        if isinstance(change, Reference):
            for conditions, key, entry in self._resolve_reference(path, scope, change):
                yield change.start, (*written[:2], (*written[2], *conditions)), key, entry
            return
        for one in change.entries:
            style, made_of = self._lookup.resolve_style(path, scope, one)
            yield one.key_span[0], written, one.key, EffectiveEntry(style, path, one.line, made_of)

    def _resolve_reference(
        self, path: Path, scope: str, reference: Reference
    ) -> Iterable[tuple[tuple[Condition, ...], str, EffectiveEntry]]:
        """Return what a plan takes over, each under conditions of its own."""
        mark = path, scope, reference.text
        node = parse_expression(reference.text)
        found = None
        if mark not in self._in_progress:
            self._in_progress.add(mark)
            found = self._resolve_expression(path, scope, reference.attribute, node)
            self._in_progress.discard(mark)
        if found is None:
            made_of = self._lookup.compute_provenance(path, node)
            return [((), UNRESOLVED, EffectiveEntry(None, path, reference.line, made_of))]
        return [(written[2], key, entry) for written, key, entry in found]

    def _resolve_expression(self, path: Path, scope: str, attribute: str, node: ast.AST) -> list[_Write] | None:
        """Return what an expression holds, None where it is no constant and no class's plan."""
        name = get_dotted_name(node)
        holder = _match_class_plan(node)
        if holder is not None:
            return self._read_class_plan(path, scope, *holder)
        constant = self._lookup.find_constant(path, scope, name) if name else None
        if constant is None:
            return None
        return list(
            self._collect_writes(constant.path, constant.scope, self._lookup.read_plan_uses(constant, attribute))
        )

    def _read_class_plan(self, path: Path, scope: str, holder: str, attribute: str) -> list[_Write] | None:
        """Return what class bodies assign to a plan of a class that is named in another."""
        if holder in (*_SELF_NAMES, scope.rpartition(".")[2]):
            return []  # what the plan holds itself is compared on its own
        above = self._graph.mro(path, scope)[1:]
        lineage = above if holder == _PARENT else self._graph.resolve_name(path, scope, holder)
        plans = {
            written: plan for written, plan in self._compute_plans(lineage).items() if written[:2] == (attribute, "")
        }
        if not plans:
            return None
        return [(written, key, entry) for written, plan in plans.items() for key, entry in plan.items()]

    def _find_offset(self, path: Path, line: int) -> int:
        source = self.get_source(path)
        assert source is not None
        return source.line_offsets[line - 1]


def file_kind(path: PurePath) -> str | None:
    """Return which of a model's files this is, None for one whose classes no model reads.

    Modular files are none: they only own what generated files say. Classes inherit from files of their own kind.
    """
    match = _MODEL_FILE.fullmatch(path.name)
    return match[1] if match else None


def _match_class_plan(node: ast.AST) -> tuple[str, str] | None:
    """Return the class and the attribute of an expression that reads a class's plan."""
    match node:
        case ast.Attribute(value=ast.Call(func=ast.Name(id="super")), attr=plan) if is_plan_attribute(plan):
            return _PARENT, plan
        case ast.Attribute(value=holder, attr=plan) if is_plan_attribute(plan):
            name = get_dotted_name(holder)
            return (name, plan) if name else None
    return None


def _merge_provenance(one: EffectiveEntry, other: EffectiveEntry) -> EffectiveEntry:
    return replace(other, provenance=f"{one.provenance}\n{other.provenance}")


def _format_label(attribute: str, function: str, conditions: tuple[Condition, ...]) -> str:
    tests = [f"if {one.test}" if one.holds else f"if not ({one.test})" for one in conditions]
    return " ".join([attribute, *([f"in {function}"] if function else []), *tests])
