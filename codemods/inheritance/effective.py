"""Effective plans: what every class's plans hold, inherited entries included, worked out from source alone.

Classes inherit as in Python, across files; a class's own plan replaces an inherited one whole. Changes that code makes
to a plan in a function, or under a condition, form a plan variant of their own, with an entry for each addition or
removal; classes inherit it with the function. Entries from constants and other classes' plans are included; anything
that cannot be followed becomes one entry, `UNRESOLVED`, which records its provenance.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from operator import itemgetter
from pathlib import Path, PurePath

from codemods.inheritance.class_graph import ClassKey
from codemods.inheritance.file_graph import FileGraph, SourceLookup
from codemods.inheritance.lookup import NameLookup
from codemods.inheritance.parsed_files import ParsedFiles
from codemods.reading.module import ClassPlans, Condition, PlanLiteral, Reference, Removal
from codemods.reading.names import get_dotted_name, parse_expression
from codemods.reading.scope import denies_plan, is_plan_attribute
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
"""The style that marks an entry as removed from a plan by code; no dialect has a style of that name."""

EVERY_KEY = "*"
"""The key that stands for all keys of a plan that code clears or replaces."""

UNRESOLVED = "(unread)"
"""The key that stands for those that a plan gets from expressions which cannot be read."""

PlanBranch = tuple[str, str, tuple[Condition, ...]]
"""The plan attribute, the function that changes it, empty for the class body, and the conditions around the change."""

_Change = PlanLiteral | Removal | Reference
_Write = tuple[PlanBranch, str, "EffectiveEntry"]
"""What is written: the plan variant's branch, the key and the entry."""

_Plans = Mapping[PlanBranch, Mapping[str, "EffectiveEntry"]]

_SELF_NAMES = ("self", "cls", "self.__class__")
_PARENT = "super()"

_MODEL_FILE = re.compile(r"(configuration|modeling)_\w+\.py")


@dataclass(frozen=True)
class PlanVariant:
    """One plan of one class, as the class body assigns it or as code changes it.

    Args:
        path: the class's file.
        class_name: the class's qualified name.
        plan: the attribute, followed by the function and conditions if code changes it.
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
        style: the style, None if it is computed; `REMOVED` if code removes the entry.
        path: the file that writes the entry, not always the class's own.
        line: the entry's line in that file, counted from 1.
        provenance: what determines a computed style, or the entries under `UNRESOLVED`.
    """

    style: str | None
    path: Path
    line: int
    provenance: str = ""


@dataclass
class EffectivePlans:
    """The effective plans of a set of files. Each file is read, and each class's own code worked out, at most once.

    Args:
        source_of: returns the files.
        is_framework: returns whether a file is the framework's own code. What functions there do to plans, they do to
            every model's; it counts as theirs, and classes do not inherit it.
        files: what was parsed of the files so far, and of other revisions.
    """

    source_of: SourceLookup
    is_framework: Callable[[Path], bool] = lambda path: False
    files: ParsedFiles = field(default_factory=ParsedFiles)
    _in_progress: set[tuple[Path, str, str]] = field(default_factory=set)
    _computed: dict[ClassKey, _Plans] = field(default_factory=dict)
    _own: dict[ClassKey, list[_Write]] = field(default_factory=dict)
    _open: set[ClassKey] = field(default_factory=set)
    _circles: int = 0

    def compute_file_plans(self, path: Path) -> dict[PlanVariant, Mapping[str, EffectiveEntry]]:
        """Return the plans of a file's classes and of its code outside of them, each from key to entry.

        There are none if the file does not exist.

        Raises:
            SourceError: the file, or one that it inherits from, cannot be parsed or inherits too deeply.
        """
        try:
            return {
                PlanVariant(path, name, _format_label(*branch), branch): plan
                for name in self.list_classes(path)
                for branch, plan in self._compute_plans((path, name)).items()
            }
        except RecursionError as error:
            raise SourceError(
                f"{path}: its classes inherit too deeply to follow", hint="leave it out", path=str(path)
            ) from error

    def list_classes(self, path: Path) -> tuple[str, ...]:
        """Return the names of a file's classes, and an empty one for its other code; none if it does not exist."""
        module = self.graph.module(path)
        return tuple(dict.fromkeys([*module.classes, ""])) if module else ()

    @cached_property
    def graph(self) -> FileGraph:
        """The files and their classes."""
        return FileGraph(self.source_of, self.files)

    @cached_property
    def lookup(self) -> NameLookup:
        """The names in the files."""
        return NameLookup(self.graph, self.is_framework)

    def _compute_plans(self, key: ClassKey) -> _Plans:
        """Return the plans of a class: those that class bodies assign, and how functions and conditions change them.

        A chain of classes with one base each is followed to its top, and then back: no class is worked out twice.
        """
        chain: dict[ClassKey, tuple[tuple[ClassKey, ...], ...]] = {}
        while key not in self._computed and key not in chain:
            chain[key] = self.graph.find_bases(*key)
            if len(chain[key]) != 1 or len(chain[key][0]) != 1:
                break
            key = chain[key][0][0]
        if not chain.keys().isdisjoint(self._open):
            return {}  # a class among its own bases
        self._open |= chain.keys()
        try:
            plans: _Plans = self._computed.get(key, {})
            circles = self._circles
            for one, bases in reversed(chain.items()):
                plans = self._apply_own(self._inherit(one, bases, plans), one)
                if circles == self._circles:
                    self._computed[one] = plans
        finally:
            self._open -= chain.keys()
        return plans

    def _inherit(self, key: ClassKey, bases: tuple[tuple[ClassKey, ...], ...], nearest: _Plans) -> _Plans:
        """Return the plans that a class inherits.

        Args:
            key: the class.
            bases: its bases, each as the classes that its name may stand for.
            nearest: the plans of its only base, unless they have been computed before.
        """
        if len(bases) == 1:
            first = bases[0][0]
            is_chained = len(bases[0]) == 1
            plans = self._computed.get(first, nearest) if is_chained else self._compute_plans(first)
            plans = self._drop_framework_code(first, plans)
        else:
            plans = {}
            for file, owner in reversed(self.graph.mro(*key)[1:]):
                plans = self._apply_own(plans, (file, owner.name), bodies_only=self.is_framework(file))
        others = [other for alternatives in bases for other in alternatives[1:]]
        return {**plans, **dict(item for other in others for item in self._list_alternative(other))}

    def _list_alternative(self, key: ClassKey) -> Iterator[tuple[PlanBranch, Mapping[str, EffectiveEntry]]]:
        """Yield the plans of a class that one of several imports of a name leads to, under that condition."""
        path, name = key
        condition = Condition(f"{name} is imported from {path.as_posix()}", True)
        for (attribute, function, conditions), plan in self._drop_framework_code(key, self._compute_plans(key)).items():
            yield (attribute, function, (condition, *conditions)), plan

    def _drop_framework_code(self, key: ClassKey, plans: _Plans) -> _Plans:
        """Return plans without what the framework's functions do to them."""
        if not self.is_framework(key[0]):
            return plans
        return {branch: plan for branch, plan in plans.items() if not branch[1]}

    def _apply_own(self, inherited: _Plans, key: ClassKey, *, bodies_only: bool = False) -> _Plans:
        """Return plans with what a class itself assigns and changes.

        Args:
            inherited: the plans of its bases.
            key: the class.
            bodies_only: whether to leave out what functions do.
        """
        path, name = key
        module = self.graph.module(path)
        assert module is not None
        owner = module.classes.get(name)
        if owner is None and name:
            return inherited
        owner = owner or ClassPlans("")
        plans = {branch: plan for branch, plan in inherited.items() if branch[1] or branch[0] not in owner.plans}
        plans |= {(attribute, "", ()): {} for attribute in owner.plans}
        changed: dict[PlanBranch, dict[str, EffectiveEntry]] = {}
        for branch, entry_key, entry in self._collect_own(path, owner):
            if bodies_only and branch[1]:
                continue
            if branch not in changed:
                changed[branch] = dict(plans.get(branch, {}))
            plan = changed[branch]
            is_merged = entry_key == UNRESOLVED and entry_key in plan
            plan[entry_key] = _merge_provenance(plan[entry_key], entry) if is_merged else entry
        return plans | changed

    def _collect_own(self, path: Path, owner: ClassPlans) -> list[_Write]:
        """Return what a class itself writes into its plans."""
        key = path, owner.name
        if key not in self._own:
            circles = self._circles
            own = (plan for plan in owner.plans.values() if isinstance(plan, PlanLiteral))
            changes: list[_Change] = [
                *own,
                *owner.code_literals,
                *owner.removals,
                *owner.references,
                *self.lookup.find_unresolved_references(path, owner),
            ]
            writes = list(self._collect_writes(path, owner.name, changes)) if changes else []
            if circles != self._circles:
                return writes  # complete only where the circle was not entered halfway
            self._own[key] = writes
        return self._own[key]

    def _collect_writes(self, path: Path, scope: str, changes: Iterable[_Change]) -> Iterator[_Write]:
        """Yield what changes write into which plan, in the order of the text."""
        writes = [write for change in changes for write in self._expand_change(path, scope, change)]
        return ((branch, key, entry) for _, branch, key, entry in sorted(writes, key=itemgetter(0)))

    def _expand_change(
        self, path: Path, scope: str, change: _Change
    ) -> Iterator[tuple[int, PlanBranch, str, EffectiveEntry]]:
        """Yield what one change writes: the offset to sort by, the branch, the key and the entry."""
        branch = change.attribute, change.function, change.conditions
        start = self._find_offset(path, change.line)
        is_missing = any(denies_plan(condition, change.attribute) for condition in change.conditions)
        if isinstance(change, Removal):
            if change.key or not is_missing:
                yield start, branch, change.key or EVERY_KEY, EffectiveEntry(REMOVED, path, change.line)
            return
        if change.replaces and change.function and not is_missing:
            yield start, branch, EVERY_KEY, EffectiveEntry(REMOVED, path, change.line)
        if isinstance(change, Reference):
            for conditions, key, entry in self._resolve_reference(path, scope, change):
                yield change.start, (*branch[:2], (*branch[2], *conditions)), key, entry
            return
        for written in change.entries:
            style, provenance = self.lookup.resolve_style(path, scope, written, change.function)
            yield written.key_span[0], branch, written.key, EffectiveEntry(style, path, written.line, provenance)

    def _resolve_reference(
        self, path: Path, scope: str, reference: Reference
    ) -> Iterable[tuple[tuple[Condition, ...], str, EffectiveEntry]]:
        """Return the entries that a plan takes from an expression, each with the conditions around it there."""
        mark = path, scope, reference.text
        node = parse_expression(reference.text)
        writes = None
        if mark not in self._in_progress:
            self._in_progress.add(mark)
            try:
                writes = self._resolve_expression(path, scope, reference.attribute, node)
            finally:
                self._in_progress.discard(mark)
        else:
            self._circles += 1
        if writes is None:
            line = reference.line if reference.function else None
            provenance = self.lookup.compute_provenance(path, node, line)
            return [((), UNRESOLVED, EffectiveEntry(None, path, reference.line, provenance))]
        return [(branch[2], key, entry) for branch, key, entry in writes]

    def _resolve_expression(self, path: Path, scope: str, attribute: str, node: ast.AST) -> list[_Write] | None:
        """Return the entries of an expression, None if it is neither a constant nor a class's plan."""
        class_plan = _match_class_plan(node)
        if class_plan is not None:
            return self._read_class_plan(path, scope, *class_plan)
        name = get_dotted_name(node)
        constant = self.lookup.find_constant(path, scope, name) if name else None
        if constant is None:
            return None
        uses = self.lookup.read_plan_uses(constant, attribute)
        return list(self._collect_writes(constant.path, constant.scope, uses))

    def _read_class_plan(self, path: Path, scope: str, class_name: str, attribute: str) -> list[_Write] | None:
        """Return what class bodies assign to the plan of a class that another class names."""
        if class_name in (*_SELF_NAMES, scope.rpartition(".")[2]):
            return []  # the plan's own entries are compared on their own
        if class_name == _PARENT:
            bases = self.graph.find_bases(path, scope)
            only = self._compute_plans(bases[0][0]) if len(bases) == 1 else {}
            plans = self._inherit((path, scope), bases, only)
        else:
            classes = tuple(self.graph.resolve(path, scope, class_name))
            if len(classes) != 1:
                return None
            plans = self._compute_plans(classes[0])
        assigned = {branch: plan for branch, plan in plans.items() if branch[:2] == (attribute, "")}
        if not assigned:
            return None
        return [(branch, key, entry) for branch, plan in assigned.items() for key, entry in plan.items()]

    def _find_offset(self, path: Path, line: int) -> int:
        source = self.source_of(path)
        assert source is not None
        return source.line_offsets[line - 1]


def file_kind(path: PurePath) -> str | None:
    """Return whether a file is a model's configuration or modeling file, None if it is neither.

    Modular files are neither: models read the generated files. Classes inherit from files of their own kind.
    """
    match = _MODEL_FILE.fullmatch(path.name)
    return match[1] if match else None


def _match_class_plan(node: ast.AST) -> tuple[str, str] | None:
    """Return the class and the attribute if an expression reads a class's plan."""
    match node:
        case ast.Attribute(value=ast.Call(func=ast.Name(id="super")), attr=plan) if is_plan_attribute(plan):
            return _PARENT, plan
        case ast.Attribute(value=owner, attr=plan) if is_plan_attribute(plan):
            name = get_dotted_name(owner)
            return (name, plan) if name else None
    return None


def _merge_provenance(one: EffectiveEntry, other: EffectiveEntry) -> EffectiveEntry:
    return replace(other, provenance=f"{one.provenance}\n{other.provenance}")


def _format_label(attribute: str, function: str, conditions: tuple[Condition, ...]) -> str:
    tests = [f"if {test.test}" if test.holds else f"if not ({test.test})" for test in conditions]
    return " ".join([attribute, *([f"in {function}"] if function else []), *tests])
