"""The classes of a file put together, and the conflicts between what its statements do to one plan."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial

from codemods.reading.module import (
    ANY_KEY,
    ClassPlans,
    Conflict,
    PlanCopy,
    PlanLiteral,
    Reference,
    Removal,
    StyleReading,
    Unresolved,
)
from codemods.reading.plan_literals import find_incomplete_modules
from codemods.reading.scope import ANY_CLASS
from plans.decompose import find_group_key
from plans.plan import to_wildcard

__all__ = ["ParsedClass", "find_change_conflicts", "find_outward_conflicts", "merge_classes"]


@dataclass(frozen=True)
class ParsedClass:
    """A class as its own code defines it, before other code of the file is considered.

    Args:
        class_plans: the class with its plans.
        unresolved: the uses that add entries to plans which cannot be read.
        conflicts: the reasons that its code gives why plans must stay as they are.
        copies: the plans that its code copies into others.
    """

    class_plans: ClassPlans
    unresolved: tuple[Unresolved, ...] = ()
    conflicts: tuple[Conflict, ...] = ()
    copies: tuple[PlanCopy, ...] = ()


def merge_classes(parsed: Iterable[ParsedClass]) -> dict[str, ClassPlans]:
    """Return the classes of a file by name, each with everything that the file does to its plans.

    Args:
        parsed: the classes of the file, and the code outside of classes.
    """
    parsed = list(parsed)
    classes = {definition.class_plans.name: definition.class_plans for definition in parsed}
    if any(owner.code_literals or owner.removals or owner.references for owner in classes.values()):
        classes = {name: _merge_uses(owner, classes.values()) for name, owner in classes.items()}
    conflicts: dict[str, dict[Conflict, None]] = defaultdict(dict)
    for conflict in [*_collect_conflicts(parsed, classes), *_find_inherited_conflicts(classes)]:
        for name in _find_concerned_classes(conflict, classes):
            conflicts[name][conflict] = None
    return {
        name: replace(owner, conflicts=tuple(conflicts[name])) if name in conflicts else owner
        for name, owner in classes.items()
        if name or owner.code_literals or owner.removals
    }


def find_outward_conflicts(parsed: Iterable[ParsedClass]) -> Iterator[Conflict]:
    """Yield the conflicts of plans of objects that may belong to classes of other files."""
    parsed = list(parsed)
    names = {definition.class_plans.name for definition in parsed}
    conflicts = _collect_conflicts(parsed, names)
    return (conflict for conflict in dict.fromkeys(conflicts) if conflict.class_name not in names)


def _find_concerned_classes(conflict: Conflict, classes: Mapping[str, ClassPlans]) -> Iterator[str]:
    """Yield the classes of the file whose plans a conflict concerns, those that inherit the code among them."""
    if conflict.class_name == ANY_CLASS:
        yield from classes
    elif owner := classes.get(conflict.class_name):
        yield owner.name
        if conflict.function:
            yield from (base.name for base in _iter_bases(owner, classes))
            yield from (
                name
                for name, subclass in classes.items()
                if any(base is owner for base in _iter_bases(subclass, classes))
            )


def _merge_uses(owner: ClassPlans, classes: Iterable[ClassPlans]) -> ClassPlans:
    """Return a class with the uses of its plans in the whole file, and without its uses of other classes' plans."""
    names = {one.name for one in classes}
    literals = [use for one in classes for use in one.code_literals if _is_owned_by(use, one, owner, names)]
    removals = [use for one in classes for use in one.removals if _is_owned_by(use, one, owner, names)]
    references = [use for one in classes for use in one.references if _is_owned_by(use, one, owner, names)]
    return replace(owner, code_literals=tuple(literals), removals=tuple(removals), references=tuple(references))


def _is_owned_by(
    use: PlanLiteral | Removal | Reference, written_in: ClassPlans, owner: ClassPlans, names: Iterable[str]
) -> bool:
    return (use.class_name if use.class_name in names else written_in.name) == owner.name


def _collect_conflicts(parsed: Sequence[ParsedClass], names: Container[str]) -> list[Conflict]:
    """Return the conflicts that the code of a file causes by itself.

    Args:
        parsed: the classes of the file, and the code outside of classes.
        names: the names of the classes.
    """
    conflicts = list(_find_code_conflicts(parsed, names))
    return [*conflicts, *_find_copying_conflicts(parsed, conflicts)]


def _find_code_conflicts(parsed: Iterable[ParsedClass], names: Container[str]) -> Iterator[Conflict]:
    for definition in parsed:
        yield from definition.conflicts
        for use in definition.unresolved:
            if use.mentions_experts or not use.is_assigned:
                reason = f"gives the plan entries {use.reason}"
                yield Conflict(use.owner or use.class_name, use.attribute, None, use.line, reason, use.function)
        for literal in definition.class_plans.code_literals:
            if literal.class_name not in names and not literal.replaces:
                for module in sorted({find_group_key(entry.key) for entry in literal.entries}):
                    conflict = partial(Conflict, attribute=literal.attribute, module=module, line=literal.line)
                    yield conflict(class_name=literal.class_name, reason="writes it too", function=literal.function)
                    yield conflict(class_name=definition.class_plans.name, reason="adds it to another class's plan")
        for removal in definition.class_plans.removals:
            if removal.class_name not in names and removal.key is not None:
                yield _build_removal_conflict(removal, removal.class_name, "removes entries from it")


def _find_copying_conflicts(parsed: Sequence[ParsedClass], conflicts: Iterable[Conflict]) -> Iterator[Conflict]:
    """Yield the conflicts of plans that are copied into other plans which code changes, through copies of copies.

    Args:
        parsed: the classes of the file, and the code outside of classes.
        conflicts: the conflicts of the file's plans.
    """
    changes: list[tuple[str, str, str | None, StyleReading | None]] = [
        (one.class_name, one.attribute, one.module, one.reading) for one in conflicts
    ]
    for definition in parsed:
        owner = definition.class_plans
        for literal in owner.code_literals:
            if not literal.replaces:
                names = {literal.class_name, owner.name}
                modules = find_incomplete_modules([literal])
                changes += [(name, literal.attribute, module, None) for name in names for module in modules]
        for removal in owner.removals:
            if removal.key is not None:
                module = _build_removal_conflict(removal, "", "").module
                changes += [(name, removal.attribute, module, None) for name in {removal.class_name, owner.name}]
    copies = [copy for definition in parsed for copy in definition.copies]
    for class_name, attribute, module, reading in changes:  # grows while copies of copies are found
        for copy in copies:
            if copy.class_name == class_name and fnmatchcase(copy.attribute, attribute):
                change = (copy.source_class, copy.source_attribute, module, reading)
                if change not in changes:
                    changes.append(change)
                    does = "tells styles of the copy apart by name" if reading else "changes the copy"
                    yield Conflict(*change[:3], copy.line, f"copies it, and other code {does}", copy.function, reading)


def _build_removal_conflict(removal: Removal, class_name: str, reason: str) -> Conflict:
    module = None if removal.key in (None, ANY_KEY) else find_group_key(to_wildcard(removal.key or ""))
    return Conflict(class_name, removal.attribute, module, removal.line, reason, removal.function)


def _find_inherited_conflicts(classes: Mapping[str, ClassPlans]) -> Iterator[Conflict]:
    """Yield the conflicts of plans that one class writes and the code of a base or a subclass changes."""
    for owner in classes.values():
        for base in _iter_bases(owner, classes):
            for attribute in _get_attributes(base):
                if attribute not in owner.plans:
                    yield from find_change_conflicts(owner, base, attribute)
            for attribute in _get_attributes(owner):
                yield from find_change_conflicts(base, owner, attribute)


def find_change_conflicts(writer: ClassPlans, target: ClassPlans, attribute: str) -> Iterator[Conflict]:
    """Yield the conflicts between a plan of a class and the code of another class that inherits it or that it inherits.

    Args:
        writer: the class with the code.
        target: the class with the plan.
        attribute: the plan.
    """
    candidates = [target.plans.get(attribute), *target.code_literals]
    literals = [candidate for candidate in candidates if isinstance(candidate, PlanLiteral)]
    written = {module: literal for literal in literals for module in _get_modules(literal, attribute)}
    for literal in writer.code_literals:
        if not literal.replaces:
            for module in sorted(written.keys() & _get_modules(literal, attribute)):
                yield Conflict(target.name, attribute, module, literal.line, f"writes it in {writer.name} too")
                yield Conflict(writer.name, attribute, module, written[module].line, f"writes it in {target.name} too")
    for removal in writer.removals:
        if removal.attribute == attribute and removal.key is not None:
            yield replace(
                _build_removal_conflict(removal, target.name, f"removes entries from it in {writer.name}"), function=""
            )


def _get_attributes(owner: ClassPlans) -> dict[str, None]:
    return dict.fromkeys([*owner.plans, *(one.attribute for one in owner.code_literals)])


def _get_modules(literal: PlanLiteral, attribute: str) -> set[str]:
    return {find_group_key(entry.key) for entry in literal.entries} if literal.attribute == attribute else set()


def _iter_bases(owner: ClassPlans, classes: Mapping[str, ClassPlans]) -> Iterator[ClassPlans]:
    """Yield the direct and indirect bases of a class that are defined in its file."""
    seen = {owner.name}
    waiting = list(owner.bases)
    while waiting:
        name = waiting.pop()
        if name in classes and name not in seen:
            seen.add(name)
            yield classes[name]
            waiting += classes[name].bases
