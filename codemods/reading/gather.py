"""Classes gathered from all over a file: what is done to a class elsewhere, and what keeps its plans as they are."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from codemods.reading.module import ANY_KEY, ClassPlans, Conflict, PlanLiteral, Reference, Removal
from codemods.reading.reader import ParsedClass
from plans.decompose import find_group_key
from plans.plan import to_wildcard

__all__ = ["merge_classes"]


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
