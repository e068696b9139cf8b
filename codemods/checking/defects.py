"""Defects of plans that no rewrite can fix, with one function for each rule."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from codemods.reading.alternatives import Alternative
from codemods.reading.module import PlanLiteral
from codemods.reading.scope import find_layer_kind
from plans.dialect import Dialect, suggest_style
from plans.placement import Replicate
from plans.plan import plan_kind
from plans.quantized import find_weight_key
from plans.rule import Finding, load_rule

__all__ = ["DefectContext", "find_defects"]

_EXPERTS_MODULE = re.compile(r"(?:.*\.)?experts")
_EXPERTS_HOOKS = frozenset({"moe_experts_allreduce", "moe_tp_experts"})
_DENSE_PROJECTION = re.compile(r"(?:.*\.)?(?:mlp|feed_forward)\.(?:gate_proj|up_proj|down_proj|gate_up_proj)")


@dataclass(frozen=True)
class DefectContext:
    """What a literal's defects depend on besides the literal.

    Args:
        dialect: the tree's dialect, with the param-level names added; None if it is not known.
        siblings: the alternatives for what else the same plan can hold, at least one.
        pending: the keys that a rewrite adds or changes, or would if it were not ignored.
        can_exist: returns whether a class of the model could create what a key names; None if the model is unknown.
        unread: the places where the tree registers styles under names that cannot be read.
    """

    dialect: Dialect | None
    siblings: tuple[Alternative, ...]
    pending: frozenset[str]
    can_exist: Callable[[str], bool] | None
    unread: tuple[str, ...] = ()


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
    if context.dialect is None:
        return
    for key, style in literal.plan.items():
        if style in context.dialect.styles:
            continue
        words = {"style": style, "dialect": context.dialect.name}
        if context.unread:
            yield _build_finding("MIG508", key, where=context.unread[0], **words)
        else:
            meant = suggest_style(style, context.dialect.styles)
            yield _build_finding("MIG501", key, meant=meant and f"; {meant}", **words)


def _find_half_migrated(literal: PlanLiteral, context: DefectContext) -> Iterator[Finding]:
    """Find hooks that sum the outputs of experts which no entry shards; EP plans have their own rule."""
    dialect = context.dialect
    if dialect is None or plan_kind(literal.attribute) == "ep" or literal.is_partial:
        return
    for key, style in literal.plan.items():
        if style not in _EXPERTS_HOOKS or not _EXPERTS_MODULE.fullmatch(key):
            continue
        is_pending = any(name.startswith(f"{key}.") for name in context.pending)
        if not is_pending and not all(_has_shards(key, literal, sibling, dialect) for sibling in context.siblings):
            yield _build_finding("MIG502", key, style=style)


def _has_shards(experts: str, literal: PlanLiteral, other: Alternative, dialect: Dialect) -> bool:
    """Return whether a plan may shard a parameter of an experts module."""
    computed = other.computed.union(entry.key for entry in literal.entries if entry.style is None)
    if other.is_partial or any(key.startswith(f"{experts}.") for key in computed):
        return True
    everything = {**other.plan, **literal.plan}
    parameters = (key for key in everything if key.startswith(f"{experts}.") and find_weight_key(key) is None)
    return any(_is_sharding(everything[key], dialect) for key in parameters)


def _is_sharding(style: str, dialect: Dialect) -> bool:
    """Return whether a style may shard a parameter; one that no dialect describes may."""
    known = dialect.styles.get(style)
    return known is None or not known.means or any(not isinstance(rule.place, Replicate) for rule in known.rules)


def _find_unapplied_expert_plan(literal: PlanLiteral, context: DefectContext) -> Iterator[Finding]:
    experts = [key for key in literal.plan if "experts" in key]
    dialect = context.dialect
    if dialect is None or plan_kind(literal.attribute) != "ep" or not experts or literal.is_partial:
        return
    refused = [(key, style) for key, style in literal.plan.items() if style in dialect.expert_plan_refuses]
    for key, style in refused:
        yield _build_finding("MIG503", key, dialect=dialect.name, reason=f"it refuses {style}")
    needs = dialect.expert_plan_needs
    if needs and not refused and not all(_has_required_styles(needs, literal, sibling) for sibling in context.siblings):
        required = " or ".join(" with ".join(need) for need in needs)
        yield _build_finding("MIG503", experts[0], dialect=dialect.name, reason=f"it looks for {required}")


def _has_required_styles(needs: Iterable[Iterable[str]], literal: PlanLiteral, other: Alternative) -> bool:
    styles = {*other.plan.values(), *literal.plan.values()}
    return other.is_partial or any(styles.issuperset(need) for need in needs)


def _find_numbered_keys(literal: PlanLiteral, context: DefectContext) -> Iterator[Finding]:
    if context.dialect is None or context.dialect.numbered_keys:
        return
    for entry in literal.entries:
        if entry.numbered:
            yield _build_finding("MIG504", entry.key, dialect=context.dialect.name)


def _find_swapped_branches(literal: PlanLiteral, context: DefectContext) -> Iterator[Finding]:
    layer_kind = find_layer_kind(literal.conditions)
    if layer_kind is None:
        return
    actual, condition = layer_kind
    sparse = [entry.key for entry in literal.entries if re.search(r"(?:^|\.)experts(?:\.|$)", entry.key)]
    dense = [entry.key for entry in literal.entries if _DENSE_PROJECTION.fullmatch(entry.key)]
    wrong, given = (sparse, "sparse") if actual == "dense" else ([] if sparse else dense, "dense")
    if wrong:
        test = condition.test if condition.holds else f"not ({condition.test})"
        yield _build_finding("MIG505", wrong[0], given=given, test=f"`{test}`", actual=actual)


def _find_impossible_keys(literal: PlanLiteral, context: DefectContext) -> Iterator[Finding]:
    if context.can_exist is None:
        return
    for key in literal.plan:
        # A computed part before the first name is left out: the rest is relative to some class of the model.
        relative = key.lstrip("*.")
        weight = find_weight_key(relative)  # a quantizer creates the scales of what the model creates
        if not context.can_exist(relative) and not (weight and context.can_exist(weight)):
            yield _build_finding("MIG506", key)


def _find_duplicate_keys(literal: PlanLiteral, context: DefectContext) -> Iterator[Finding]:
    counts = Counter(entry.key for entry in literal.entries if not entry.computed)
    for key, count in counts.items():
        if count > 1:
            yield _build_finding("MIG507", key)


def _build_finding(code: str, key: str, **words: str) -> Finding:
    return Finding(code, key, load_rule(code).message.format(key=key, **words))
