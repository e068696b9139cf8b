"""Effective plans: what every class's plans hold, inherited entries included, worked out from source alone.

Classes inherit as Python's do, across files. A plan's own value replaces an inherited one whole. What code makes of a
plan in a function, or under a condition, is a plan of its own here, with an entry for each that it adds or takes out;
classes inherit it with the function. What a plan takes over from constants and other classes' plans is in it too; of
what cannot be followed there is one entry, `UNREAD`, that says what it is made of.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from operator import itemgetter
from pathlib import Path, PurePath

from codemods.inheritance.lineage import Ancestor, Lineages, SourceOf
from codemods.inheritance.lookup import Lookup
from codemods.reading.module import Condition, PlanLiteral, Removal, Taken
from codemods.reading.names import dotted
from codemods.reading.origins import expression
from codemods.reading.plan_names import is_plan_attribute
from plans.errors import SourceError

__all__ = [
    "EVERY_KEY",
    "REMOVED",
    "UNREAD",
    "EffectiveEntry",
    "EffectivePlans",
    "PlanPlace",
    "Written",
    "file_kind",
]

REMOVED = "removed by code"
"""Stands for the style of an entry that code takes out of a plan; no dialect has a style of that name."""

EVERY_KEY = "*"
"""Stands for the keys of a plan that code empties or replaces."""

UNREAD = "(unread)"
"""Stands for the keys that a plan gets from what nobody here can read."""

Written = tuple[str, str, tuple[Condition, ...]]
"""Which plan, in which function and under which conditions; a class body is no function."""

_Change = PlanLiteral | Removal | Taken
_Write = tuple[Written, str, "EffectiveEntry"]
"""What is written: the plan, the key and the entry."""

_OWN = ("self", "cls", "self.__class__")
_PARENT = "super()"

_MODEL_FILE = re.compile(r"(configuration|modeling)_\w+\.py")


@dataclass(frozen=True)
class PlanPlace:
    """Which plan of which class.

    Args:
        path: the class's file.
        class_name: the class.
        plan: the attribute; of what code adds, with the function and the conditions around it.
        written: the same, in parts.
    """

    path: Path
    class_name: str
    plan: str
    written: Written = field(default=("", "", ()), compare=False)


@dataclass(frozen=True)
class EffectiveEntry:
    """One entry of an effective plan.

    Args:
        style: None where it is computed; `REMOVED` where code takes it out.
        path: the file that it is written in, not always the class's own.
        line: where it stands there, counted from 1.
        made_of: all that a computed style, or what is under `UNREAD`, is made of.
    """

    style: str | None
    path: Path
    line: int
    made_of: str = ""


@dataclass
class EffectivePlans:
    """The effective plans of a set of files, each parsed at most once.

    Args:
        source_of: gives the files.
    """

    source_of: SourceOf
    _open: set[tuple[Path, str, str]] = field(default_factory=set)

    def of_file(self, path: Path) -> dict[PlanPlace, Mapping[str, EffectiveEntry]]:
        """Return every plan of a file's classes by place, each from key to entry; of a file that is gone, none.

        Raises:
            SourceError: the file, or one that it inherits from, does not parse or inherits without end.
        """
        try:
            return {
                PlanPlace(path, name, _label(*written), written): plan
                for name in self.classes(path)
                for written, plan in self._plans(self._lineages.of(path, name)).items()
            }
        except RecursionError as error:
            self._lineages.forget()
            raise SourceError(
                f"{path}: its classes inherit too deeply to follow", hint="leave it out", path=str(path)
            ) from error

    def classes(self, path: Path) -> tuple[str, ...]:
        """Return the names of a file's classes; of a file that is gone, none."""
        module = self._lineages.module(path)
        return tuple(module.classes) if module else ()

    @cached_property
    def _lineages(self) -> Lineages:
        return Lineages(self.source_of)

    @cached_property
    def _lookup(self) -> Lookup:
        return Lookup(self._lineages)

    def _plans(self, lineage: Iterable[Ancestor]) -> dict[Written, dict[str, EffectiveEntry]]:
        """Return the plans of a class: what class bodies assign, and what functions and conditions make of it."""
        plans: dict[Written, dict[str, EffectiveEntry]] = {}
        for file, owner in reversed(tuple(lineage)):
            for attribute in owner.plans:
                plans = {written: one for written, one in plans.items() if written[:2] != (attribute, "")}
                plans[attribute, "", ()] = {}
            own = (plan for plan in owner.plans.values() if isinstance(plan, PlanLiteral))
            changes: list[_Change] = [
                *own,
                *owner.code,
                *owner.removals,
                *owner.taken,
                *self._lookup.hidden(file, owner),
            ]
            for written, key, entry in self._writes(file, owner.name, changes):
                plan = plans.setdefault(written, {})
                plan[key] = _beside(plan[key], entry) if key == UNREAD and key in plan else entry
        return plans

    def _writes(self, path: Path, scope: str, changes: Iterable[_Change]) -> Iterator[_Write]:
        """Yield what is written into which plan, in the order of the text."""
        placed = [write for change in changes for write in self._of_change(path, scope, change)]
        return ((written, key, entry) for _, written, key, entry in sorted(placed, key=itemgetter(0)))

    def _of_change(self, path: Path, scope: str, change: _Change) -> Iterator[tuple[int, Written, str, EffectiveEntry]]:
        """Yield what one change writes: a place to sort by, the plan, the key and the entry."""
        written = change.attribute, change.function, change.conditions
        start = self._start(path, change.line)
        if isinstance(change, Removal):
            yield start, written, change.key or EVERY_KEY, EffectiveEntry(REMOVED, path, change.line)
            return
        if change.replaces and change.function:
            yield start, written, EVERY_KEY, EffectiveEntry(REMOVED, path, change.line)
        if isinstance(change, Taken):
            for conditions, key, entry in self._taken(path, scope, change):
                yield change.start, (*written[:2], (*written[2], *conditions)), key, entry
            return
        for one in change.entries:
            style, made_of = self._lookup.style(path, scope, one)
            yield one.key_span[0], written, one.key, EffectiveEntry(style, path, one.line, made_of)

    def _taken(
        self, path: Path, scope: str, taken: Taken
    ) -> Iterable[tuple[tuple[Condition, ...], str, EffectiveEntry]]:
        """Return what a plan takes over, each under conditions of its own."""
        mark = path, scope, taken.text
        node = expression(taken.text)
        found = None
        if mark not in self._open:
            self._open.add(mark)
            found = self._followed(path, scope, taken.attribute, node)
            self._open.discard(mark)
        if found is None:
            made_of = self._lookup.behind(path, node)
            return [((), UNREAD, EffectiveEntry(None, path, taken.line, made_of))]
        return [(written[2], key, entry) for written, key, entry in found]

    def _followed(self, path: Path, scope: str, attribute: str, node: ast.AST) -> list[_Write] | None:
        """Return what an expression holds, None where it is no constant and no class's plan."""
        name = dotted(node)
        holder = _holder(node)
        if holder is not None:
            return self._of_class(path, scope, *holder)
        constant = self._lookup.constant(path, scope, name) if name else None
        if constant is None:
            return None
        return list(self._writes(constant.path, constant.scope, self._lookup.uses(constant, attribute)))

    def _of_class(self, path: Path, scope: str, holder: str, attribute: str) -> list[_Write] | None:
        """Return what class bodies assign to a plan of a class that is named in another."""
        if holder in (*_OWN, scope.rpartition(".")[2]):
            return []  # what the plan holds itself is compared on its own
        above = self._lineages.of(path, scope)[1:]
        lineage = above if holder == _PARENT else self._lineages.meant(path, scope, holder)
        plans = {written: plan for written, plan in self._plans(lineage).items() if written[:2] == (attribute, "")}
        if not plans:
            return None
        return [(written, key, entry) for written, plan in plans.items() for key, entry in plan.items()]

    def _start(self, path: Path, line: int) -> int:
        source = self.source_of(path)
        assert source is not None
        return source.line_offsets[line - 1]


def file_kind(path: PurePath) -> str | None:
    """Return which of a model's files this is, None for one whose classes no model reads.

    Modular files are none: they only own what generated files say. Classes inherit from files of their own kind.
    """
    match = _MODEL_FILE.fullmatch(path.name)
    return match[1] if match else None


def _holder(node: ast.AST) -> tuple[str, str] | None:
    """Return the class and the attribute of an expression that reads a class's plan."""
    match node:
        case ast.Attribute(value=ast.Call(func=ast.Name(id="super")), attr=plan) if is_plan_attribute(plan):
            return _PARENT, plan
        case ast.Attribute(value=holder, attr=plan) if is_plan_attribute(plan):
            name = dotted(holder)
            return (name, plan) if name else None
    return None


def _beside(one: EffectiveEntry, other: EffectiveEntry) -> EffectiveEntry:
    return replace(other, made_of=f"{one.made_of}\n{other.made_of}")


def _label(attribute: str, function: str, conditions: tuple[Condition, ...]) -> str:
    tests = [f"if {one.test}" if one.holds else f"if not ({one.test})" for one in conditions]
    return " ".join([attribute, *([f"in {function}"] if function else []), *tests])
