"""The alternatives of a plan: what it can contain together with one of its literals, given the conditions around them.

A plan is the result of all literals of a class that write one attribute and can apply together: of two exclusive
branches only one applies, and a literal that replaces the plan drops everything that was written before.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

from codemods.reading.module import ClassPlans, Condition, PlanLiteral, are_exclusive
from codemods.reading.scope import find_layer_kind
from plans.decompose import find_group_key

__all__ = ["Alternative", "find_alternatives", "keep_relevant_literals"]

_MAX_COMBINATIONS = 64  # the most literals of one plan, and combinations of them, that are examined

_KnownConditions = frozenset[tuple[str, Condition]]
"""Conditions whose outcome is fixed, each with its function: the same test may differ in another function."""


@dataclass(frozen=True)
class Alternative:
    """What a plan contains besides one literal, in one of the possible cases.

    Args:
        plan: key to style.
        computed: the keys whose style is computed.
        is_partial: whether the plan may have other entries, which cannot be read here.
        lines: key to the line that writes its entry.
    """

    plan: Mapping[str, str] = field(default_factory=dict)
    computed: frozenset[str] = frozenset()
    is_partial: bool = False
    lines: Mapping[str, int] = field(default_factory=dict)


def keep_relevant_literals(owner: ClassPlans, this: PlanLiteral) -> ClassPlans:
    """Return a class without the literals that do not affect the experts modules written by one of them."""
    modules = _get_group_keys(this)
    relevant = (
        literal
        for literal in owner.code_literals
        if literal is this or literal.replaces or literal.is_partial or modules & _get_group_keys(literal)
    )
    return replace(owner, code_literals=tuple(relevant))


def find_alternatives(owner: ClassPlans, this: PlanLiteral) -> tuple[Alternative, ...]:
    """Return what the plan of a literal can contain besides it: at least one alternative.

    Args:
        owner: the class.
        this: one of its literals.
    """
    candidates = [owner.plans.get(this.attribute), *owner.code_literals]
    literals = [one for one in candidates if isinstance(one, PlanLiteral) and one.attribute == this.attribute]
    if len(literals) == 1:
        return (Alternative(),)
    if len(literals) > _MAX_COMBINATIONS:
        return (_build_partial(literals, this),)
    possible = [literal for literal in literals if not are_exclusive(literal, this)]
    known = frozenset((this.function, condition) for condition in this.conditions)
    # Every unknown test splits at least one combination in two.
    tests = {(literal.function, condition.test) for literal in possible for condition in _get_model_conditions(literal)}
    unknown = tests - {(function, condition.test) for function, condition in known}
    if len(unknown) >= _MAX_COMBINATIONS:
        return (_build_partial(possible, this),)
    combinations = list(islice(_iter_combinations(possible, known), _MAX_COMBINATIONS + 1))
    if len(combinations) > _MAX_COMBINATIONS:
        return (_build_partial(possible, this),)
    distinct: list[Alternative] = []
    for combination in combinations:
        alternative = _build_alternative(_find_coexisting(combination, this))
        distinct += [alternative] if alternative not in distinct else []
    return tuple(distinct)


def _iter_combinations(literals: Sequence[PlanLiteral], known: _KnownConditions) -> Iterator[Sequence[PlanLiteral]]:
    """Yield the literals that apply together, for every possible outcome of their conditions."""
    unknown = (
        (literal.function, condition)
        for literal in literals
        for condition in _get_model_conditions(literal)
        if (literal.function, condition) not in known
    )
    function, condition = next(unknown, ("", None))
    if condition is None:
        yield literals
        return
    for chosen, other in ((condition, _negate(condition)), (_negate(condition), condition)):
        applying = [
            literal
            for literal in literals
            if literal.function != function or other not in _get_model_conditions(literal)
        ]
        yield from _iter_combinations(applying, known | {(function, chosen)})


def _get_model_conditions(literal: PlanLiteral) -> tuple[Condition, ...]:
    """Return the conditions that are the same for the whole model; those on a layer can differ from layer to layer."""
    if any(entry.computed for entry in literal.entries):
        return ()
    return tuple(condition for condition in literal.conditions if find_layer_kind((condition,)) is None)


def _negate(condition: Condition) -> Condition:
    return replace(condition, holds=not condition.holds)


def _find_coexisting(literals: Sequence[PlanLiteral], this: PlanLiteral) -> list[PlanLiteral]:
    """Return the literals whose entries are in the plan together with those of this literal."""
    current: list[PlanLiteral] = []
    for literal in literals:
        replaced = [earlier for earlier in current if _is_replacing(literal, earlier)]
        if any(earlier is this for earlier in replaced):
            break
        current = [one for one in current if not any(one is earlier for earlier in replaced)] + [literal]
    return [literal for literal in current if literal is not this]


def _is_replacing(later: PlanLiteral, earlier: PlanLiteral) -> bool:
    """Return whether a literal drops an earlier one; of two literals that replace the plan only one has an effect."""
    return later.replaces and (earlier.replaces or earlier.function in ("", later.function))


def _build_alternative(literals: Sequence[PlanLiteral]) -> Alternative:
    return Alternative(
        {key: style for literal in literals for key, style in literal.plan.items()},
        frozenset(entry.key for literal in literals for entry in literal.entries if entry.style is None),
        any(literal.is_partial for literal in literals),
        {entry.key: entry.line for literal in literals for entry in literal.entries},
    )


def _get_group_keys(literal: PlanLiteral) -> set[str]:
    return {find_group_key(entry.key) for entry in literal.entries if "experts" in entry.key}


def _build_partial(literals: Sequence[PlanLiteral], this: PlanLiteral) -> Alternative:
    """Return a single alternative instead of too many: the plan may contain every literal, and other entries."""
    return replace(_build_alternative([literal for literal in literals if literal is not this]), is_partial=True)
