"""Classes gathered from all over a file: what is done to a class elsewhere, and what keeps its plans as they are."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from codemods.reading.module import ANY_KEY, ClassPlans, Hold, PlanLiteral, Removal, Taken
from codemods.reading.reader import Found
from plans.decompose import decided_with
from plans.plan import wildcard

__all__ = ["gather"]


def gather(found: Iterable[Found]) -> dict[str, ClassPlans]:
    """Return the classes of a file by name, each with all that the file says of its plans.

    Args:
        found: what was found class by class, and outside of classes.
    """
    found = list(found)
    classes = {one.owner.name: one.owner for one in found}
    if any(owner.code or owner.removals or owner.taken for owner in classes.values()):
        classes = {name: _with_elsewhere(owner, classes.values()) for name, owner in classes.items()}
    holds: dict[str, list[Hold]] = defaultdict(list)
    for hold in [*_said(found), *_between_relatives(classes)]:
        holds[hold.class_name].append(hold)
    return {
        name: replace(owner, holds=tuple(holds[name])) if name in holds else owner
        for name, owner in classes.items()
        if name or owner.code or owner.removals
    }


def _with_elsewhere(owner: ClassPlans, everyone: Iterable[ClassPlans]) -> ClassPlans:
    """Take in what other code of the file does to a class's plans, and leave what is done to other classes to them."""
    names = {one.name for one in everyone}
    code = [one for other in everyone for one in other.code if _belongs(one, other, owner, names)]
    removed = [one for other in everyone for one in other.removals if _belongs(one, other, owner, names)]
    taken = [one for other in everyone for one in other.taken if _belongs(one, other, owner, names)]
    return replace(owner, code=tuple(code), removals=tuple(removed), taken=tuple(taken))


def _belongs(
    use: PlanLiteral | Removal | Taken, written_in: ClassPlans, owner: ClassPlans, names: Iterable[str]
) -> bool:
    return (use.class_name if use.class_name in names else written_in.name) == owner.name


def _said(found: Iterable[Found]) -> Iterator[Hold]:
    for one in found:
        yield from one.holds
        for use in one.unread:
            if use.experts:
                yield Hold(use.class_name, use.attribute, None, f"line {use.line} gives the plan entries {use.why}")


def _between_relatives(classes: Mapping[str, ClassPlans]) -> Iterator[Hold]:
    """Yield holds for what code of a class changes in a plan that another class writes, a base or one that inherits."""
    for owner in classes.values():
        for base in _bases(owner, classes):
            for attribute in _attributes(base):
                if attribute not in owner.plans:
                    yield from _changes(owner, base, attribute)
            for attribute in _attributes(owner):
                yield from _changes(base, owner, attribute)


def _changes(changing: ClassPlans, changed: ClassPlans, attribute: str) -> Iterator[Hold]:
    literals = [changed.plans.get(attribute), *changed.code]
    written = {module for one in literals if isinstance(one, PlanLiteral) for module in _modules(one, attribute)}
    for literal in changing.code:
        if not literal.replaces:
            for module in sorted(written & _modules(literal, attribute)):
                why = f"line {literal.line} writes it in {changing.name} too"
                yield Hold(changed.name, attribute, module, why)
                yield Hold(changing.name, attribute, module, f"{changed.name} writes it too")
    for removal in changing.removals:
        if removal.attribute == attribute and removal.key is not None:
            taken = None if removal.key == ANY_KEY else decided_with(wildcard(removal.key))
            why = f"line {removal.line} takes entries out of it in {changing.name}"
            yield Hold(changed.name, attribute, taken, why)


def _attributes(owner: ClassPlans) -> dict[str, None]:
    return dict.fromkeys([*owner.plans, *(one.attribute for one in owner.code)])


def _modules(literal: PlanLiteral, attribute: str) -> set[str]:
    return {decided_with(entry.key) for entry in literal.entries} if literal.attribute == attribute else set()


def _bases(owner: ClassPlans, classes: Mapping[str, ClassPlans]) -> Iterator[ClassPlans]:
    """Yield the bases of a class in its own file, however far up."""
    seen = {owner.name}
    waiting = list(owner.bases)
    while waiting:
        name = waiting.pop()
        if name in classes and name not in seen:
            seen.add(name)
            yield classes[name]
            waiting += classes[name].bases
