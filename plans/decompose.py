"""The param-level decomposition of one plan: entries in, edits and findings out, whatever the entries stand in.

The same function serves plan literals in source (codemods) and the plans of models built in memory (runtime).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from plans.layout import ExpertLayout
from plans.plan import plan_kind
from plans.rule import Finding, rule

__all__ = [
    "Decision",
    "Decomposition",
    "Edit",
    "InsertEntry",
    "LayoutReader",
    "SetStyle",
    "apply_edits",
    "decided_with",
    "decompose",
    "is_decomposed_plan",
]

LayoutReader = Callable[[str], ExpertLayout | None]
"""From the key of an experts module, `layers.*.mlp.experts`, to its layout, None where it cannot be read."""

_EXPERT_PARAMETER = re.compile(r"(?P<experts>(?:.*\.)?experts)\.(?P<parameter>gate_up_proj|up_proj|down_proj)")
_EXPERTS_MODULE = re.compile(r"(?:.*\.)?experts")
_RULES_OF_PARAMETER = {"gate_up_proj": ("MIG001", "MIG004"), "down_proj": ("MIG002", "MIG005")}


@dataclass(frozen=True)
class SetStyle:
    """Give the entry `key` another style."""

    code: str
    key: str
    before: str
    style: str


@dataclass(frozen=True)
class InsertEntry:
    """Add an entry `key: style` just before the entry `anchor`."""

    code: str
    key: str
    style: str
    anchor: str


Edit = SetStyle | InsertEntry


@dataclass(frozen=True)
class Decomposition:
    """What is to change in a plan, and what a person should know of it.

    Args:
        edits: to be made together.
        findings: in the order of the plan.
        disputed: experts modules that some circumstances would change and others not, so that nothing may.
    """

    edits: tuple[Edit, ...]
    findings: tuple[Finding, ...]
    disputed: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Decision:
    """What is changed as a whole or not at all: one experts module in one plan, however many literals write it.

    Args:
        class_name: whose plan it is.
        attribute: of the plan.
        module: the key of the experts module; of any other entry its own key.
    """

    class_name: str
    attribute: str
    module: str


_STORED_FORM = "colwise"
"""What shards packed experts in the form that their checkpoint stores."""


def decided_with(key: str) -> str:
    """Return the key that an entry is decided with: its experts module's, or its own."""
    module = key.rpartition(".")[0]
    return module if _EXPERTS_MODULE.fullmatch(module) else key


def is_decomposed_plan(name: str) -> bool:
    """Say whether the rules speak of a plan attribute: TP and SP plans, never EP plans, which name parameters already.

    Combination plans (`base_model_tp_ep_plan`) hold EP entries for their experts and stay as they are too.
    """
    return plan_kind(name) in ("tp", "sp")


def decompose(
    plan: Mapping[str, str], layout_of: LayoutReader, beside: Mapping[str, str] | None = None
) -> Decomposition:
    """Work out the param-level form of a TP or SP plan.

    Args:
        plan: key to style, in source order.
        layout_of: reads the layout guard's facts; asked at most once for each experts module.
        beside: entries that the same plan gets elsewhere; they count, but are not edited here.
    """
    edits: list[Edit] = []
    findings: list[Finding] = []
    everything = {**(beside or {}), **plan}
    for experts in _experts_modules(plan):
        for result in _decompose_experts(everything, experts, layout_of):
            if isinstance(result, Finding):
                findings.append(result)
            elif (result.anchor if isinstance(result, InsertEntry) else result.key) in plan:
                edits.append(result)
    return Decomposition(tuple(edits), tuple(findings))


def apply_edits(plan: Mapping[str, str], edits: tuple[Edit, ...]) -> dict[str, str]:
    """Return the plan with the edits made, entries in order."""
    changed = {edit.key: edit.style for edit in edits if isinstance(edit, SetStyle)}
    result: dict[str, str] = {}
    for key, style in plan.items():
        result |= {edit.key: edit.style for edit in edits if isinstance(edit, InsertEntry) and edit.anchor == key}
        result[key] = changed.get(key, style)
    return result


def _experts_modules(plan: Mapping[str, str]) -> list[str]:
    found: dict[str, None] = {}
    for key in plan:
        if match := _EXPERT_PARAMETER.fullmatch(key):
            found[match["experts"]] = None
        elif _EXPERTS_MODULE.fullmatch(key):
            found[key] = None
    return list(found)


def _decompose_experts(plan: Mapping[str, str], experts: str, layout_of: LayoutReader) -> Iterator[Edit | Finding]:
    gate_up, down = f"{experts}.gate_up_proj", f"{experts}.down_proj"
    gate_up_style, down_style = plan.get(gate_up), plan.get(down)
    if gate_up_style is None and down_style is None and f"{experts}.up_proj" not in plan:
        if plan.get(experts) in rule("MIG003").rewrites:
            yield from _guarded(plan, experts, layout_of, _insertions(experts))
        return
    migratable = {rule(code).to for code in ("MIG001", "MIG004")}.union(
        rule("MIG001").rewrites, rule("MIG004").rewrites
    )
    if gate_up_style in rule("MIG201").rewrites:
        yield _finding("MIG201", gate_up, str(gate_up_style))
    elif gate_up_style not in migratable:
        yield from _left_alone(plan, experts, layout_of)
    elif _after_renames(plan, down) != rule("MIG002").to:
        yield _finding("MIG202", gate_up, str(gate_up_style))
    elif renames := list(_renames(plan, gate_up, down)):
        yield from _guarded(plan, gate_up, layout_of, renames)


def _guarded(
    plan: Mapping[str, str], key: str, layout_of: LayoutReader, edits: Iterable[Edit]
) -> Iterator[Edit | Finding]:
    experts = key.removesuffix(".gate_up_proj")
    layout = layout_of(experts)
    if layout is None:
        yield _finding("MIG203", key, plan[key])
    elif layout.irregularity:
        yield _finding(layout.irregularity, key, plan[key], layout.where)
    else:
        yield from edits


def _renames(plan: Mapping[str, str], *keys: str) -> Iterator[SetStyle]:
    """Give each key the style that the one rule speaking of its parameter and its style writes."""
    for key in keys:
        for code in _RULES_OF_PARAMETER[key.rpartition(".")[2]]:
            if plan.get(key) in rule(code).rewrites:
                yield SetStyle(code, key, plan[key], rule(code).to)


def _after_renames(plan: Mapping[str, str], key: str) -> str | None:
    return next((edit.style for edit in _renames(plan, key)), plan.get(key))


def _insertions(experts: str) -> Iterator[Edit]:
    for parameter, code in (("gate_up_proj", "MIG001"), ("down_proj", "MIG002")):
        yield InsertEntry("MIG003", f"{experts}.{parameter}", rule(code).to, anchor=experts)


def _left_alone(plan: Mapping[str, str], experts: str, layout_of: LayoutReader) -> Iterator[Finding]:
    """Say why the parameter entries of an experts module keep styles that no rule rewrites."""
    key = next((f"{experts}.{name}" for name in ("gate_up_proj", "up_proj") if f"{experts}.{name}" in plan), None)
    if key is None:
        yield _finding("MIG202", f"{experts}.down_proj", plan[f"{experts}.down_proj"])
        return
    layout = layout_of(experts)
    if layout is None:
        yield _finding("MIG203", key, plan[key])
    else:
        # Only a plain colwise is known to shard what a checkpoint stores interleaved; other names say nothing.
        regular = "MIG104" if plan[key] == _STORED_FORM else "MIG205"
        yield _finding(layout.irregularity or regular, key, plan[key], layout.where)


def _finding(code: str, key: str, style: str, where: str = "") -> Finding:
    return Finding(code, key, rule(code).message.format(key=key, style=style, where=where, to=rule(code).to))
