"""Defects of plans that no rewrite can mend: one function for each rule, each with a literal and what is around it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from codemods.reading.alternatives import Alternative
from codemods.reading.branches import layer_kind
from codemods.reading.module import PlanLiteral
from plans.dialect import Dialect, meant_style
from plans.placement import Replicate
from plans.plan import plan_kind
from plans.rule import Finding, rule

__all__ = ["Around", "find_defects"]

_EXPERTS_MODULE = re.compile(r"(?:.*\.)?experts")
_EXPERTS_HOOKS = frozenset({"moe_experts_allreduce", "moe_tp_experts"})
_DENSE_PROJECTION = re.compile(r"(?:.*\.)?(?:mlp|feed_forward)\.(?:gate_proj|up_proj|down_proj|gate_up_proj)")


@dataclass(frozen=True)
class Around:
    """What a literal's defects depend on besides the literal.

    Args:
        dialect: of the tree, with the param-level names.
        beside: what the same plan can hold besides, one alternative at least.
        pending: keys that a rewrite is about to add or change, or would if nobody had ignored it.
        could_exist: whether some class of the model could create what a key names; None where nobody can tell.
    """

    dialect: Dialect
    beside: tuple[Alternative, ...]
    pending: frozenset[str]
    could_exist: Callable[[str], bool] | None


def find_defects(literal: PlanLiteral, around: Around) -> Iterator[Finding]:
    """Yield every defect of one literal."""
    for defect in (
        _unknown_styles,
        _half_migrated,
        _expert_plan_not_applied,
        _numbered_keys,
        _swapped_branches,
        _impossible_keys,
        _keys_given_twice,
    ):
        yield from defect(literal, around)


def _unknown_styles(literal: PlanLiteral, around: Around) -> Iterator[Finding]:
    for key, style in literal.plan.items():
        if style not in around.dialect.styles:
            meant = meant_style(style, around.dialect.styles)
            yield _finding("MIG501", key, style=style, dialect=around.dialect.name, meant=meant and f"; {meant}")


def _half_migrated(literal: PlanLiteral, around: Around) -> Iterator[Finding]:
    """A hook that sums what nobody has cut; EP plans have their own rule."""
    if plan_kind(literal.attribute) == "ep" or literal.takes_in:
        return
    for key, style in literal.plan.items():
        if style not in _EXPERTS_HOOKS or not _EXPERTS_MODULE.fullmatch(key):
            continue
        will_be = any(name.startswith(f"{key}.") for name in around.pending)
        if not will_be and any(not _has_shards(key, literal, one, around.dialect) for one in around.beside):
            yield _finding("MIG502", key, style=style)


def _has_shards(experts: str, literal: PlanLiteral, other: Alternative, dialect: Dialect) -> bool:
    """Say whether a plan may shard a parameter of an experts module."""
    computed = other.computed.union(entry.key for entry in literal.entries if entry.style is None)
    if other.takes_in or any(key.startswith(f"{experts}.") for key in computed):
        return True
    everything = {**other.plan, **literal.plan}
    return any(_shards(style, dialect) for key, style in everything.items() if key.startswith(f"{experts}."))


def _shards(style: str, dialect: Dialect) -> bool:
    known = dialect.styles.get(style)
    return known is None or any(not isinstance(found.place, Replicate) for found in known.rules)


def _expert_plan_not_applied(literal: PlanLiteral, around: Around) -> Iterator[Finding]:
    experts = [key for key in literal.plan if "experts" in key]
    if plan_kind(literal.attribute) != "ep" or not experts or literal.takes_in:
        return
    dialect = around.dialect
    refused = [(key, style) for key, style in literal.plan.items() if style in dialect.expert_plan_refuses]
    for key, style in refused:
        yield _finding("MIG503", key, dialect=dialect.name, reason=f"it refuses {style}")
    needs = dialect.expert_plan_needs
    if needs and not refused and not all(_has_needed(needs, literal, one) for one in around.beside):
        named = " or ".join(" with ".join(need) for need in needs)
        yield _finding("MIG503", experts[0], dialect=dialect.name, reason=f"it looks for {named}")


def _has_needed(needs: Iterable[Iterable[str]], literal: PlanLiteral, other: Alternative) -> bool:
    styles = {*other.plan.values(), *literal.plan.values()}
    return other.takes_in or any(styles.issuperset(need) for need in needs)


def _numbered_keys(literal: PlanLiteral, around: Around) -> Iterator[Finding]:
    if around.dialect.numbered_keys:
        return
    for entry in literal.entries:
        if entry.numbered:
            yield _finding("MIG504", entry.key, dialect=around.dialect.name)


def _swapped_branches(literal: PlanLiteral, around: Around) -> Iterator[Finding]:
    told = layer_kind(literal.conditions)
    if told is None:
        return
    actual, condition = told
    sparse = [entry.key for entry in literal.entries if re.search(r"(?:^|\.)experts(?:\.|$)", entry.key)]
    dense = [entry.key for entry in literal.entries if _DENSE_PROJECTION.fullmatch(entry.key)]
    wrong, given = (sparse, "sparse") if actual == "dense" else ([] if sparse else dense, "dense")
    if wrong:
        test = condition.test if condition.holds else f"not ({condition.test})"
        yield _finding("MIG505", wrong[0], given=given, test=f"`{test}`", actual=actual)


def _impossible_keys(literal: PlanLiteral, around: Around) -> Iterator[Finding]:
    if around.could_exist is not None:
        for key in literal.plan:
            # What stands before the first name is computed: the rest counts from some class of the model all the same.
            if not around.could_exist(key.lstrip("*.")):
                yield _finding("MIG506", key)


def _keys_given_twice(literal: PlanLiteral, around: Around) -> Iterator[Finding]:
    counts = Counter(entry.key for entry in literal.entries if not entry.computed)
    for key, count in counts.items():
        if count > 1:
            yield _finding("MIG507", key)


def _finding(code: str, key: str, **words: str) -> Finding:
    return Finding(code, key, rule(code).message.format(key=key, **words))
