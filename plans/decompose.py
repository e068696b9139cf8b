"""The param-level decomposition of one plan: it takes entries and returns edits and findings.

The same function serves plan literals in source files (codemods) and the plans of models in memory (runtime).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from plans.dialect import dialect_names, load_dialect
from plans.model_facts import ExpertLayout, UnreadLayout
from plans.placement import Placement, Replicate, Shard
from plans.plan import plan_kind
from plans.quantized import find_weight_key, is_whole_style, iter_scale_keys
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
    "get_anchor",
    "is_decomposable_plan",
]

LayoutReader = Callable[[str], ExpertLayout | UnreadLayout | None]
"""Maps the key of an experts module, `layers.*.mlp.experts`, to its layout, or to why it cannot be read if known."""

_EXPERT_PARAMETER = re.compile(r"(?P<experts>(?:.*\.)?experts)\.(?P<parameter>gate_up_proj|up_proj|down_proj)")
_EXPERTS_MODULE = re.compile(r"(?:.*\.)?experts")
_RULES_OF_PARAMETER = {"gate_up_proj": ("MIG001", "MIG004"), "down_proj": ("MIG002", "MIG005")}
_INTERLEAVED_STYLE = "colwise"
"""The style that shards packed experts in the interleaved form in which their checkpoint stores them."""


_DIVIDING_NO_EXPERT: frozenset[Placement | None] = frozenset({Shard(0), Replicate()})
_STACKED_RANK = 3


@dataclass(frozen=True)
class SetStyle:
    """Change the style of the entry `key`."""

    code: str
    key: str
    before: str
    style: str


@dataclass(frozen=True)
class InsertEntry:
    """Insert an entry `key: style` directly before the entry `anchor`."""

    code: str
    key: str
    style: str
    anchor: str


Edit = SetStyle | InsertEntry


@dataclass(frozen=True)
class Decomposition:
    """The edits that a plan needs, and the findings about it.

    Args:
        edits: the edits, to be made together.
        findings: the findings, in the order of the plan.
        ambiguous: the experts modules that must stay as they are, because the edits they need depend on conditions
            around the entries.
    """

    edits: tuple[Edit, ...]
    findings: tuple[Finding, ...]
    ambiguous: frozenset[str] = frozenset()


@dataclass(frozen=True)
class EditGroup:
    """Entries that are edited together or not at all: those of one experts module, in all literals of one plan.

    Args:
        class_name: the class that has the plan.
        attribute: the plan's attribute.
        module: the key of the experts module; for any other entry, its own key.
    """

    class_name: str
    attribute: str
    module: str


def find_group_key(key: str) -> str:
    """Return the key of the experts module that an entry belongs to, or the entry's own key.

    The scales of an experts' parameter belong to the module, too.
    """
    module = (find_weight_key(key) or key).rpartition(".")[0]
    return module if _EXPERTS_MODULE.fullmatch(module) else key


def is_decomposable_plan(name: str) -> bool:
    """Return whether the rules apply to a plan attribute: to TP and SP plans, not to EP plans, which name parameters.

    Combined plans (`base_model_tp_ep_plan`) have EP entries for their experts and stay as they are, too.
    """
    return plan_kind(name) in ("tp", "sp")


def decompose(
    plan: Mapping[str, str], read_layout: LayoutReader, other_entries: Mapping[str, str] | None = None
) -> Decomposition:
    """Return the edits that turn a TP or SP plan into its param-level form.

    Args:
        plan: key to style, in source order.
        read_layout: reads the layout of an experts module; called at most once for each.
        other_entries: entries that the plan gets elsewhere; they are considered, but not edited.
    """
    edits: list[Edit] = []
    findings: list[Finding] = []
    held: set[str] = set()
    whole_plan = {**(other_entries or {}), **plan}
    for experts in _find_experts_modules(plan):
        results = list(_decompose_experts(whole_plan, experts, read_layout))
        results += _decompose_scales(whole_plan, experts, [each for each in results if not isinstance(each, Finding)])
        found = [result for result in results if isinstance(result, Finding)]
        if any(finding.code == "MIG207" for finding in found):
            held.add(experts)
        findings += found
        edits += [
            result
            for result in results
            if not isinstance(result, Finding) and experts not in held and get_anchor(result) in plan
        ]
    return Decomposition(tuple(edits), tuple(findings), frozenset(held))


def get_anchor(edit: Edit) -> str:
    """Return the key of the existing entry that an edit changes or inserts before."""
    return edit.anchor if isinstance(edit, InsertEntry) else edit.key


def apply_edits(plan: Mapping[str, str], edits: tuple[Edit, ...]) -> dict[str, str]:
    """Return the plan with the edits applied, its entries in order."""
    changed = {edit.key: edit.style for edit in edits if isinstance(edit, SetStyle)}
    result: dict[str, str] = {}
    for key, style in plan.items():
        result |= {edit.key: edit.style for edit in edits if isinstance(edit, InsertEntry) and edit.anchor == key}
        result[key] = changed.get(key, style)
    return result


def _find_experts_modules(plan: Mapping[str, str]) -> list[str]:
    modules: dict[str, None] = {}
    for key in plan:
        if match := _EXPERT_PARAMETER.fullmatch(find_weight_key(key) or key):
            modules[match["experts"]] = None
        elif _EXPERTS_MODULE.fullmatch(key):
            modules[key] = None
    return list(modules)


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
    if layout is None or isinstance(layout, UnreadLayout):
        yield _build_unread_finding(key, plan[key], layout)
    elif layout.irregularity:
        yield _build_finding(layout.irregularity, key, plan[key], layout.where)
    else:
        yield from edits


def _rename_styles(plan: Mapping[str, str], *keys: str) -> Iterator[SetStyle]:
    """Yield the edits of those keys whose parameter and style have a rule that rewrites them."""
    for key in keys:
        for code in _RULES_OF_PARAMETER[key.rpartition(".")[2]]:
            if plan.get(key) in load_rule(code).rewrites:
                yield SetStyle(code, key, plan[key], load_rule(code).to)


def _decompose_scales(plan: Mapping[str, str], experts: str, edits: Iterable[Edit]) -> Iterator[Edit | Finding]:
    """Yield the edits that cut the scales of an experts module's parameters as the other edits cut the parameters.

    Scales of parameters that keep their styles keep theirs. A scale that is cut in another way holds its parameter.
    """
    for parameter, codes in _RULES_OF_PARAMETER.items():
        weight = f"{experts}.{parameter}"
        final = next((edit.style for edit in edits if edit.key == weight), plan.get(weight))
        for key in iter_scale_keys(plan, weight):
            renames = [SetStyle(code, key, plan[key], load_rule(code).to) for code in codes]
            rename = next((edit for edit in renames if edit.before in load_rule(edit.code).rewrites), None)
            if final == load_rule(codes[0]).to and rename:
                yield rename
            elif final == load_rule(codes[0]).to and plan[key] != final and not is_whole_style(plan[key]):
                yield _build_finding("MIG207", key, plan[key], weight)
            elif final is None and rename:
                yield _build_finding("MIG206", key, plan[key], weight)


def _resolve_final_style(plan: Mapping[str, str], key: str) -> str | None:
    return next((edit.style for edit in _rename_styles(plan, key)), plan.get(key))


def _insert_entries(experts: str) -> Iterator[Edit]:
    for parameter, code in (("gate_up_proj", "MIG001"), ("down_proj", "MIG002")):
        yield InsertEntry("MIG003", f"{experts}.{parameter}", load_rule(code).to, anchor=experts)


def _explain_unchanged(plan: Mapping[str, str], experts: str, read_layout: LayoutReader) -> Iterator[Finding]:
    """Yield why the parameter entries of an experts module keep styles that no rule rewrites."""
    key = next((f"{experts}.{name}" for name in ("gate_up_proj", "up_proj") if f"{experts}.{name}" in plan), None)
    if key is None:
        yield _build_finding("MIG202", f"{experts}.down_proj", plan[f"{experts}.down_proj"])
        return
    layout = read_layout(experts)
    if layout is None or isinstance(layout, UnreadLayout):
        yield _build_unread_finding(key, plan[key], layout)
    else:
        down = plan.get(f"{experts}.down_proj")
        code, where = (
            _explain_style(plan[key], down) if not layout.irregularity else (layout.irregularity, layout.where)
        )
        yield _build_finding(code, key, plan[key], where)


def _explain_style(gate_up: str, down: str | None) -> tuple[str, str]:
    """Return the code and the words for a style that no rule rewrites on gate and up that are concatenated.

    Args:
        gate_up: the style.
        down: the style of the counterpart, None without an entry.
    """
    if gate_up == _INTERLEAVED_STYLE:  # the only one known to shard the interleaved form of a checkpoint
        return "MIG104", ""
    if not (placements := _find_placements(gate_up)):
        return "MIG205", ""
    where = f"it is {_describe(placements)}"
    if not placements <= _DIVIDING_NO_EXPERT:
        return "MIG208", f"{where} of `[experts, 2 * intermediate, hidden]`"
    if down is None:
        return "MIG208", f"{where}, but down_proj has no entry"
    if (others := _find_placements(down)) != placements:
        return "MIG208", f"{where}, but {down} on down_proj is {_describe(others)}"
    return "MIG106", ""


def _find_placements(style: str) -> frozenset[Placement | None]:
    """Return where the dialects that know a style put a parameter of experts; None if it is a style of modules."""
    known = (load_dialect(name).styles.get(style) for name in dialect_names())
    return frozenset(each.placement("module", _STACKED_RANK, "gate_up_proj") for each in known if each)


def _describe(placements: Iterable[Placement | None]) -> str:
    return (
        " or ".join(sorted({"a style of modules" if each is None else str(each) for each in placements})) or "unknown"
    )


def _build_unread_finding(key: str, style: str, layout: UnreadLayout | None) -> Finding:
    where = f"{layout.cause}; {layout.step}" if layout else "the experts' layout is not known"
    return _build_finding("MIG203", key, style, where)


def _build_finding(code: str, key: str, style: str, where: str = "") -> Finding:
    return Finding(code, key, load_rule(code).message.format(key=key, style=style, where=where, to=load_rule(code).to))
