"""Alternatives: what a plan can hold beside one of its literals, by the conditions around the others.

A plan is what the literals of one class put into one attribute, as far as they can apply together: of two exclusive
arms only one ever does, and what replaces the plan drops all that it held before.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

from codemods.reading.conditions import find_layer_kind
from codemods.reading.module import ClassPlans, Condition, PlanLiteral, are_exclusive
from plans.decompose import find_group_key

__all__ = ["Alternative", "find_alternatives", "keep_relevant_literals"]

_MAX_COMBINATIONS = 64  # literals of one plan, and combinations of them, that are told apart

_KnownConditions = frozenset[tuple[str, Condition]]
"""Conditions that are decided, each with its function: only there the same test is the same."""


@dataclass(frozen=True)
class Alternative:
    """What a plan holds beside one literal in one of the cases that there are.

    Args:
        plan: key to style.
        computed: keys whose style is computed.
        is_partial: whether entries may come in besides that nobody here can see.
        lines: key to the line that writes it.
    """

    plan: Mapping[str, str] = field(default_factory=dict)
    computed: frozenset[str] = frozenset()
    is_partial: bool = False
    lines: Mapping[str, int] = field(default_factory=dict)


def keep_relevant_literals(owner: ClassPlans, this: PlanLiteral) -> ClassPlans:
    """Return a class without those literals that cannot matter to the experts modules that one of them writes."""
    modules = _get_group_keys(this)
    code = (
        one
        for one in owner.code_literals
        if one is this or one.replaces or one.is_partial or modules & _get_group_keys(one)
    )
    return replace(owner, code_literals=tuple(code))


def find_alternatives(owner: ClassPlans, this: PlanLiteral) -> tuple[Alternative, ...]:
    """Return what the plan of a literal can hold beside it, one alternative at least.

    Args:
        owner: the class.
        this: one of its literals.
    """
    written = [owner.plans.get(this.attribute), *owner.code_literals]
    literals = [one for one in written if isinstance(one, PlanLiteral) and one.attribute == this.attribute]
    if len(literals) == 1:
        return (Alternative(),)
    if len(literals) > _MAX_COMBINATIONS:
        return (_build_partial(literals, this),)
    possible = [one for one in literals if not are_exclusive(one, this)]
    settled = frozenset((this.function, condition) for condition in this.conditions)
    # Every open test splits one combination in two at least once.
    tests = {(one.function, condition.test) for one in possible for condition in _get_model_conditions(one)}
    splits = len(tests - {(function, condition.test) for function, condition in settled})
    found = (
        list(islice(_iter_combinations(possible, settled), _MAX_COMBINATIONS + 1)) if splits < _MAX_COMBINATIONS else []
    )
    if not found or len(found) > _MAX_COMBINATIONS:
        return (_build_partial(possible, this),)
    distinct: list[Alternative] = []
    for combination in found:
        alternative = _build_alternative(_find_coexisting(combination, this))
        distinct += [alternative] if alternative not in distinct else []
    return tuple(distinct)


def _iter_combinations(literals: Sequence[PlanLiteral], known: _KnownConditions) -> Iterator[Sequence[PlanLiteral]]:
    """Yield the literals that apply together, for every way in which their conditions can turn out."""
    still_open = (
        (one.function, condition)
        for one in literals
        for condition in _get_model_conditions(one)
        if (one.function, condition) not in known
    )
    function, condition = next(still_open, ("", None))
    if condition is None:
        yield literals
        return
    for chosen, other in ((condition, _negate(condition)), (_negate(condition), condition)):
        kept = [one for one in literals if one.function != function or other not in _get_model_conditions(one)]
        yield from _iter_combinations(kept, known | {(function, chosen)})


def _get_model_conditions(literal: PlanLiteral) -> tuple[Condition, ...]:
    """Return the conditions that hold for the whole model or not at all; those on a layer do both, layer by layer."""
    if any(entry.computed for entry in literal.entries):
        return ()
    return tuple(condition for condition in literal.conditions if find_layer_kind((condition,)) is None)


def _negate(condition: Condition) -> Condition:
    return replace(condition, holds=not condition.holds)


def _find_coexisting(literals: Sequence[PlanLiteral], this: PlanLiteral) -> list[PlanLiteral]:
    """Return the literals whose entries are in the plan together with this one's."""
    held: list[PlanLiteral] = []
    for literal in literals:
        dropped = [one for one in held if _is_replacing(literal, one)]
        if any(one is this for one in dropped):
            break
        held = [one for one in held if not any(one is gone for gone in dropped)] + [literal]
    return [one for one in held if one is not this]


def _is_replacing(later: PlanLiteral, earlier: PlanLiteral) -> bool:
    """Return whether a literal leaves nothing of one before it; of two that replace the plan only one ever counts."""
    return later.replaces and (earlier.replaces or earlier.function in ("", later.function))


def _build_alternative(literals: Sequence[PlanLiteral]) -> Alternative:
    return Alternative(
        {key: style for one in literals for key, style in one.plan.items()},
        frozenset(entry.key for one in literals for entry in one.entries if entry.style is None),
        any(one.is_partial for one in literals),
        {entry.key: entry.line for one in literals for entry in one.entries},
    )


def _get_group_keys(literal: PlanLiteral) -> set[str]:
    return {find_group_key(entry.key) for entry in literal.entries if "experts" in entry.key}


def _build_partial(literals: Sequence[PlanLiteral], this: PlanLiteral) -> Alternative:
    """Return one alternative for too many of them: everything may be in the plan, and more."""
    return replace(_build_alternative([one for one in literals if one is not this]), is_partial=True)
