"""The param-level decomposition of one plan: entries in, edits and findings out, whatever the entries stand in.

The same function serves plan literals in source (codemods) and the plans of models built in memory (runtime).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from plans.model_facts import ExpertLayout
from plans.plan import plan_kind
from plans.rule import Finding, load_rule

__all__ = [
    "Decomposition",
    "Edit",
    "EditGroup",
    "InsertEntry",
    "LayoutReader",
    "SetStyle",
    "apply_edits",
    "decompose",
    "find_group_key",
    "is_decomposable_plan",
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
        ambiguous: experts modules that some circumstances would change and others not, so that nothing may.
    """

    edits: tuple[Edit, ...]
    findings: tuple[Finding, ...]
    ambiguous: frozenset[str] = frozenset()


@dataclass(frozen=True)
class EditGroup:
    """What is changed as a whole or not at all: one experts module in one plan, however many literals write it.

    Args:
        class_name: whose plan it is.
        attribute: of the plan.
        module: the key of the experts module; of any other entry its own key.
    """

    class_name: str
    attribute: str
    module: str


_INTERLEAVED_STYLE = "colwise"
"""What shards packed experts in the form that their checkpoint stores."""


def find_group_key(key: str) -> str:
    """Return the key that an entry is decided with: its experts module's, or its own."""
    module = key.rpartition(".")[0]
    return module if _EXPERTS_MODULE.fullmatch(module) else key


def is_decomposable_plan(name: str) -> bool:
    """Say whether the rules speak of a plan attribute: TP and SP plans, never EP plans, which name parameters already.

    Combination plans (`base_model_tp_ep_plan`) hold EP entries for their experts and stay as they are too.
    """
    return plan_kind(name) in ("tp", "sp")


def decompose(
    plan: Mapping[str, str], read_layout: LayoutReader, other_entries: Mapping[str, str] | None = None
) -> Decomposition:
    """Work out the param-level form of a TP or SP plan.

    Args:
        plan: key to style, in source order.
        read_layout: reads the layout guard's facts; asked at most once for each experts module.
        other_entries: entries that the same plan gets elsewhere; they count, but are not edited here.
    """
    edits: list[Edit] = []
    findings: list[Finding] = []
    everything = {**(other_entries or {}), **plan}
    for experts in _find_experts_modules(plan):
        for result in _decompose_experts(everything, experts, read_layout):
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


def _find_experts_modules(plan: Mapping[str, str]) -> list[str]:
    found: dict[str, None] = {}
    for key in plan:
        if match := _EXPERT_PARAMETER.fullmatch(key):
            found[match["experts"]] = None
        elif _EXPERTS_MODULE.fullmatch(key):
            found[key] = None
    return list(found)


def _decompose_experts(plan: Mapping[str, str], experts: str, read_layout: LayoutReader) -> Iterator[Edit | Finding]:
    gate_up, down = f"{experts}.gate_up_proj", f"{experts}.down_proj"
    gate_up_style, down_style = plan.get(gate_up), plan.get(down)
    if gate_up_style is None and down_style is None and f"{experts}.up_proj" not in plan:
        if plan.get(experts) in load_rule("MIG003").rewrites:
            yield from _check_layout(plan, experts, read_layout, _insert_entries(experts))
        return
    migratable = {load_rule(code).to for code in ("MIG001", "MIG004")}.union(
        load_rule("MIG001").rewrites, load_rule("MIG004").rewrites
    )
    if gate_up_style in load_rule("MIG201").rewrites:
        yield _build_finding("MIG201", gate_up, str(gate_up_style))
    elif gate_up_style not in migratable:
        yield from _explain_unchanged(plan, experts, read_layout)
    elif _resolve_final_style(plan, down) != load_rule("MIG002").to:
        yield _build_finding("MIG202", gate_up, str(gate_up_style))
    elif renames := list(_rename_styles(plan, gate_up, down)):
        yield from _check_layout(plan, gate_up, read_layout, renames)


def _check_layout(
    plan: Mapping[str, str], key: str, read_layout: LayoutReader, edits: Iterable[Edit]
) -> Iterator[Edit | Finding]:
    experts = key.removesuffix(".gate_up_proj")
    layout = read_layout(experts)
    if layout is None:
        yield _build_finding("MIG203", key, plan[key])
    elif layout.irregularity:
        yield _build_finding(layout.irregularity, key, plan[key], layout.where)
    else:
        yield from edits


def _rename_styles(plan: Mapping[str, str], *keys: str) -> Iterator[SetStyle]:
    """Give each key the style that the one rule speaking of its parameter and its style writes."""
    for key in keys:
        for code in _RULES_OF_PARAMETER[key.rpartition(".")[2]]:
            if plan.get(key) in load_rule(code).rewrites:
                yield SetStyle(code, key, plan[key], load_rule(code).to)


def _resolve_final_style(plan: Mapping[str, str], key: str) -> str | None:
    return next((edit.style for edit in _rename_styles(plan, key)), plan.get(key))


def _insert_entries(experts: str) -> Iterator[Edit]:
    for parameter, code in (("gate_up_proj", "MIG001"), ("down_proj", "MIG002")):
        yield InsertEntry("MIG003", f"{experts}.{parameter}", load_rule(code).to, anchor=experts)


def _explain_unchanged(plan: Mapping[str, str], experts: str, read_layout: LayoutReader) -> Iterator[Finding]:
    """Say why the parameter entries of an experts module keep styles that no rule rewrites."""
    key = next((f"{experts}.{name}" for name in ("gate_up_proj", "up_proj") if f"{experts}.{name}" in plan), None)
    if key is None:
        yield _build_finding("MIG202", f"{experts}.down_proj", plan[f"{experts}.down_proj"])
        return
    layout = read_layout(experts)
    if layout is None:
        yield _build_finding("MIG203", key, plan[key])
    else:
        # Only a plain colwise is known to shard what a checkpoint stores interleaved; other names say nothing.
        regular = "MIG104" if plan[key] == _INTERLEAVED_STYLE else "MIG205"
        yield _build_finding(layout.irregularity or regular, key, plan[key], layout.where)


def _build_finding(code: str, key: str, style: str, where: str = "") -> Finding:
    return Finding(code, key, load_rule(code).message.format(key=key, style=style, where=where, to=load_rule(code).to))
