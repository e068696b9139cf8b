"""Checks of a plan on a model and a mesh: well-formed entries, modes that fit, sizes that divide, all in order."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import nn

from plans.dialect import suggest_style
from plans.errors import IndivisibleError, PlanError, UnknownStyleError, UsageError
from plans.mesh import Mesh, Mode
from plans.placement import Packed, Shard
from plans.plan import to_wildcard
from plans.resolved_plan import ResolvedParameter
from runtime.checks.fused_layers import count_blocks
from runtime.checks.head_parameters import check_head_norms, check_sharded_head_parameters
from runtime.checks.linear_layers import check_head_counts, check_pairs
from runtime.checks.module_kinds import check_module_kinds, check_sharded_modules
from runtime.checks.plan_view import PlanView
from runtime.checks.sequence import check_sequence_plan

__all__ = [
    "check_before_sharding",
    "check_divisible",
    "check_entries",
    "check_mode",
    "check_model",
]

_NUMBER = re.compile(r"(^|\.)\d+(\.|$)")


def check_model(model: object) -> None:
    """Check that a model is one on which a plan can be resolved.

    Raises:
        UsageError: it is not a module with a config.
    """
    if not isinstance(model, nn.Module) or getattr(model, "config", None) is None:
        kind = model.__name__ if isinstance(model, type) else type(model).__name__
        raise UsageError(
            f"{kind} is not a transformers model with a config",
            hint="pass a model, built from its config or loaded by from_pretrained",
            model=kind,
        )


def check_mode(mode: Mode, mesh: Mesh) -> None:
    """Check that a mesh has the axes that a mode uses, and no other.

    Raises:
        UsageError: expert parallel modes need ep > 1 and the others ep = 1; `ep` alone needs tp = ep and no FSDP;
            pipeline stages go with `tp` only.
    """
    if mesh.pp > 1 and mode != "tp":
        raise UsageError(
            f"mode {mode!r} on a mesh of {mesh}: no release of transformers combines it with pipeline stages",
            hint="leave `pp` out, or use `mode=tp`",
            mode=mode,
        )
    uses_experts = mode.endswith("ep")
    if uses_experts != (mesh.ep > 1):
        raise UsageError(
            f"mode {mode!r} on a mesh of {mesh}: "
            + ("it needs an expert axis" if uses_experts else "it uses no expert axis"),
            hint="set `ep=2` or more" if uses_experts else f"leave `ep` out, or set `mode={mode}_ep`",
            mode=mode,
        )
    if mode == "ep" and not (mesh.tp == mesh.ep and mesh.fsdp == 1):
        raise UsageError(
            f"mode 'ep' keeps dense parameters whole on the same ranks, but the mesh is {mesh}",
            hint=f"set `tp={mesh.ep}` and `ep={mesh.ep}`, or `mode=tp_ep`",
            mode=mode,
        )


def check_entries(view: PlanView) -> None:
    """Check that every entry is well-formed and names a style of the dialect.

    Raises:
        UsageError: a key or a style is not text.
        PlanError: a key is empty, or mixes numbers and wildcards.
        UnknownStyleError: the dialect has no such style.
    """
    for key, style in view.plan.items():
        _check_entry_form(key, style)
        if style not in view.dialect.styles:
            known = [name for name in view.styles.names if name in view.dialect.styles]
            raise UnknownStyleError(
                f"{key!r}: the dialect {view.dialect.name} has no style {style!r}",
                hint=suggest_style(style, known, "styles that can run: " + ", ".join(known)),
                key=key,
                style=style,
                dialect=view.dialect.name,
            )


def _check_entry_form(key: object, style: object) -> None:
    if not (isinstance(key, str) and isinstance(style, str)):
        raise UsageError(
            f"a plan maps keys to styles, both text, got {key!r}: {style!r}",
            hint="write keys as the model names its modules, 'model.layers.*.mlp.up_proj', and styles as 'colwise'",
        )
    if not key:
        raise PlanError(
            "the empty key names the model itself, which no style works on",
            hint="name the modules in it instead",
            key=key,
        )
    if "*" in key.split(".") and _NUMBER.search(key):
        raise PlanError(
            f"the key {key!r} mixes a number and a wildcard, and matches nothing",
            hint=f"write wildcards for all numbers, {to_wildcard(key)!r}, or a number for each",
            key=key,
        )


def check_divisible(view: PlanView, mesh: Mesh, parameters: Sequence[ResolvedParameter]) -> None:
    """Check that each axis divides the packed groups, attention heads, fused blocks or experts that it shards.

    Args:
        view: the plan on its model.
        mesh: the sizes of the mesh axes.
        parameters: the model's parameters as the plan resolves them.

    Raises:
        IndivisibleError: an axis does not divide one of them; names the sizes that work.
    """
    counts_over_tp = {**_get_packed_sizes(parameters), **_count_heads(view), **count_blocks(view)}
    for axis, size, counts in (("tp", mesh.tp, counts_over_tp), ("ep", mesh.ep, _count_experts(parameters))):
        for what, count in counts.items():
            if count % size:
                smallest = min(counts.values())
                works = [n for n in range(1, smallest + 1) if all(other % n == 0 for other in counts.values())]
                raise IndivisibleError(
                    f"{axis}={size} does not divide {what}, {count}",
                    hint="sizes that work: " + ", ".join(map(str, works)),
                    what=what,
                    size=count,
                    works=works,
                )


def _count_experts(parameters: Sequence[ResolvedParameter]) -> dict[str, int]:
    return {
        f"the experts of {to_wildcard(parameter.name)}": parameter.shape[0]
        for parameter in parameters
        if parameter.mesh == "experts" and parameter.placements[-1] == Shard(0) and len(parameter.shape) > 2
    }


def _get_packed_sizes(parameters: Sequence[ResolvedParameter]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for parameter in parameters:
        placement = parameter.placements[-1]
        if isinstance(placement, Packed):
            size = parameter.shape[placement.dim] // placement.groups
            sizes[f"the intermediate size of {to_wildcard(parameter.name)}"] = size
    return sizes


def _count_heads(view: PlanView) -> dict[str, int]:
    """Count the heads of every projection whose output the plan leaves sharded: heads must be whole on each rank."""
    counts: dict[str, int] = {}
    for name, key in view.module_keys.items():
        module, style = view.modules[name], view.dialect.style(view.plan[key], key)
        is_sharded = style.output == "sharded" and isinstance(style.placement("linear", 2, "weight"), Shard)
        if is_sharded and isinstance(module, nn.Linear):
            owner, _, projection = name.rpartition(".")
            heads = _count_projection_heads(view.modules[owner], projection, module)
            if heads is not None:
                counts[f"the heads of {key}"] = heads
    return counts


def _count_projection_heads(attention: nn.Module, projection: str, module: nn.Linear) -> int | None:
    """Count the heads in an attention projection's output, None if it holds none."""
    head_dim: Any = getattr(attention, "head_dim", None)
    if projection in ("q_proj", "k_proj", "v_proj") and isinstance(head_dim, int):
        return module.out_features // head_dim
    if projection in ("q_proj", "q_b_proj"):
        config: Any = getattr(attention, "config", None)
        count: Any = getattr(attention, "num_heads", None) or getattr(config, "num_attention_heads", None)
        return count if isinstance(count, int) else None
    return None


def check_before_sharding(view: PlanView, mesh: Mesh) -> None:
    """Run every check of a resolved plan that can run before the model is changed.

    Raises:
        UnknownStyleError: an entry names a style that cannot run.
        PlanError: the sharded model would compute something else.
    """
    for key, style in view.plan.items():
        view.styles.style(style, key)
    check_sequence_plan(view)
    check_module_kinds(view)
    if mesh.tp > 1:
        check_pairs(view)
        check_head_counts(view)
        check_head_norms(view)
        check_sharded_head_parameters(view)
    check_sharded_modules(view)
