"""Defects of plans that no rewrite can mend: one function for each rule, each with a literal and what is around it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from codemods.branches import layer_kind
from codemods.module import PlanLiteral
from plans.dialect import Dialect
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
        beside: entries that the same plan gets from other literals of the class.
        pending: keys that a rewrite is about to add or change.
        could_exist: whether some class of the model could create what a key names; None where nobody can tell.
    """

    dialect: Dialect
    beside: Mapping[str, str]
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
            yield _finding("MIG501", key, style=style, dialect=around.dialect.name)


def _half_migrated(literal: PlanLiteral, around: Around) -> Iterator[Finding]:
    """A hook that sums what nobody has cut; EP plans have their own rule."""
    if plan_kind(literal.attribute) == "ep" or literal.takes_in:
        return
    everything = {**around.beside, **literal.plan}
    for key, style in literal.plan.items():
        if style not in _EXPERTS_HOOKS or not _EXPERTS_MODULE.fullmatch(key):
            continue
        below = {name: found for name, found in everything.items() if name.startswith(f"{key}.")}
        will_be = any(name.startswith(f"{key}.") for name in around.pending)
        if not will_be and not any(_shards(found, around.dialect) for found in below.values()):
            yield _finding("MIG502", key, style=style)


def _shards(style: str, dialect: Dialect) -> bool:
    known = dialect.styles.get(style)
    return known is None or any(not isinstance(found.place, Replicate) for found in known.rules)


def _expert_plan_not_applied(literal: PlanLiteral, around: Around) -> Iterator[Finding]:
    styles = {**around.beside, **literal.plan}.values()
    experts = [key for key in literal.plan if "experts" in key]
    if plan_kind(literal.attribute) != "ep" or not experts or literal.takes_in:
        return
    dialect = around.dialect
    refused = [(key, style) for key, style in literal.plan.items() if style in dialect.expert_plan_refuses]
    for key, style in refused:
        yield _finding("MIG503", key, dialect=dialect.name, reason=f"it refuses {style}")
    needs = dialect.expert_plan_needs
    if needs and not refused and not any(set(need) <= set(styles) for need in needs):
        named = " or ".join(" with ".join(need) for need in needs)
        yield _finding("MIG503", experts[0], dialect=dialect.name, reason=f"it looks for {named}")


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
