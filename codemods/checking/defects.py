"""Defects of plans that no rewrite can mend: one function for each rule, each with a literal and what is around it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from codemods.reading.alternatives import Alternative
from codemods.reading.conditions import find_layer_kind
from codemods.reading.module import PlanLiteral
from plans.dialect import Dialect, suggest_style
from plans.placement import Replicate
from plans.plan import plan_kind
from plans.rule import Finding, load_rule

__all__ = ["DefectContext", "find_defects"]

_EXPERTS_MODULE = re.compile(r"(?:.*\.)?experts")
_EXPERTS_HOOKS = frozenset({"moe_experts_allreduce", "moe_tp_experts"})
_DENSE_PROJECTION = re.compile(r"(?:.*\.)?(?:mlp|feed_forward)\.(?:gate_proj|up_proj|down_proj|gate_up_proj)")


@dataclass(frozen=True)
class DefectContext:
    """What a literal's defects depend on besides the literal.

    Args:
        dialect: of the tree, with the param-level names.
        siblings: what the same plan can hold besides, one alternative at least.
        pending: keys that a rewrite is about to add or change, or would if nobody had ignored it.
        can_exist: whether some class of the model could create what a key names; None where nobody can tell.
    """

    dialect: Dialect
    siblings: tuple[Alternative, ...]
    pending: frozenset[str]
    can_exist: Callable[[str], bool] | None


def find_defects(literal: PlanLiteral, context: DefectContext) -> Iterator[Finding]:
    """Yield every defect of one literal."""
    for defect in (
        _find_unknown_styles,
        _find_half_migrated,
        _find_unapplied_expert_plan,
        _find_numbered_keys,
        _find_swapped_branches,
        _find_impossible_keys,
        _find_duplicate_keys,
    ):
        yield from defect(literal, context)


def _find_unknown_styles(literal: PlanLiteral, context: DefectContext) -> Iterator[Finding]:
    for key, style in literal.plan.items():
        if style not in context.dialect.styles:
            meant = suggest_style(style, context.dialect.styles)
            yield _build_finding("MIG501", key, style=style, dialect=context.dialect.name, meant=meant and f"; {meant}")


def _find_half_migrated(literal: PlanLiteral, context: DefectContext) -> Iterator[Finding]:
    """A hook that sums what nobody has cut; EP plans have their own rule."""
    if plan_kind(literal.attribute) == "ep" or literal.is_partial:
        return
    for key, style in literal.plan.items():
        if style not in _EXPERTS_HOOKS or not _EXPERTS_MODULE.fullmatch(key):
            continue
        will_be = any(name.startswith(f"{key}.") for name in context.pending)
        if not will_be and any(not _has_shards(key, literal, one, context.dialect) for one in context.siblings):
            yield _build_finding("MIG502", key, style=style)


def _has_shards(experts: str, literal: PlanLiteral, other: Alternative, dialect: Dialect) -> bool:
    """Say whether a plan may shard a parameter of an experts module."""
    computed = other.computed.union(entry.key for entry in literal.entries if entry.style is None)
    if other.is_partial or any(key.startswith(f"{experts}.") for key in computed):
        return True
    everything = {**other.plan, **literal.plan}
    return any(_is_sharding(style, dialect) for key, style in everything.items() if key.startswith(f"{experts}."))


def _is_sharding(style: str, dialect: Dialect) -> bool:
    known = dialect.styles.get(style)
    return known is None or any(not isinstance(found.place, Replicate) for found in known.rules)


def _find_unapplied_expert_plan(literal: PlanLiteral, context: DefectContext) -> Iterator[Finding]:
    experts = [key for key in literal.plan if "experts" in key]
    if plan_kind(literal.attribute) != "ep" or not experts or literal.is_partial:
        return
    dialect = context.dialect
    refused = [(key, style) for key, style in literal.plan.items() if style in dialect.expert_plan_refuses]
    for key, style in refused:
        yield _build_finding("MIG503", key, dialect=dialect.name, reason=f"it refuses {style}")
    needs = dialect.expert_plan_needs
    if needs and not refused and not all(_has_required_styles(needs, literal, one) for one in context.siblings):
        named = " or ".join(" with ".join(need) for need in needs)
        yield _build_finding("MIG503", experts[0], dialect=dialect.name, reason=f"it looks for {named}")


def _has_required_styles(needs: Iterable[Iterable[str]], literal: PlanLiteral, other: Alternative) -> bool:
    styles = {*other.plan.values(), *literal.plan.values()}
    return other.is_partial or any(styles.issuperset(need) for need in needs)


def _find_numbered_keys(literal: PlanLiteral, context: DefectContext) -> Iterator[Finding]:
    if context.dialect.numbered_keys:
        return
    for entry in literal.entries:
        if entry.numbered:
            yield _build_finding("MIG504", entry.key, dialect=context.dialect.name)


def _find_swapped_branches(literal: PlanLiteral, context: DefectContext) -> Iterator[Finding]:
    told = find_layer_kind(literal.conditions)
    if told is None:
        return
    actual, condition = told
    sparse = [entry.key for entry in literal.entries if re.search(r"(?:^|\.)experts(?:\.|$)", entry.key)]
    dense = [entry.key for entry in literal.entries if _DENSE_PROJECTION.fullmatch(entry.key)]
    wrong, given = (sparse, "sparse") if actual == "dense" else ([] if sparse else dense, "dense")
    if wrong:
        test = condition.test if condition.holds else f"not ({condition.test})"
        yield _build_finding("MIG505", wrong[0], given=given, test=f"`{test}`", actual=actual)


def _find_impossible_keys(literal: PlanLiteral, context: DefectContext) -> Iterator[Finding]:
    if context.can_exist is not None:
        for key in literal.plan:
            # What stands before the first name is computed: the rest counts from some class of the model all the same.
            if not context.can_exist(key.lstrip("*.")):
                yield _build_finding("MIG506", key)


def _find_duplicate_keys(literal: PlanLiteral, context: DefectContext) -> Iterator[Finding]:
    counts = Counter(entry.key for entry in literal.entries if not entry.computed)
    for key, count in counts.items():
        if count > 1:
            yield _build_finding("MIG507", key)


def _build_finding(code: str, key: str, **words: str) -> Finding:
    return Finding(code, key, load_rule(code).message.format(key=key, **words))
