"""What a plan must not do to a model: name what no class could create, or cut what must stay whole."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from plans.dialect import Dialect, suggest_style
from plans.errors import IndivisibleError, PlanError, UnknownStyleError, UnmatchedKeyError, UsageError
from plans.mesh import Mesh, Mode
from plans.model_facts import ExpertLayout
from plans.placement import Packed, Placement, Replicate, Shard
from plans.plan import find_key, find_unmatched_keys, to_wildcard
from plans.resolved_plan import ResolvedParameter
from runtime.checks.creatable import find_unknown_part
from runtime.checks.experts_layout import read_expert_layout
from runtime.styles.registry import StyleRegistry

__all__ = [
    "check_divisible",
    "check_entries",
    "check_mode",
    "check_model",
    "check_packed_experts",
    "check_stacked_experts",
    "check_unmatched_entries",
]


def check_mode(mode: Mode, mesh: Mesh) -> None:
    """Refuse a mode on a mesh that lacks its axis, or has one that it does not use.

    Raises:
        UsageError: expert parallel modes need ep > 1 and the others none; `ep` alone needs tp = ep and no FSDP.
    """
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


def check_unmatched_entries(model: nn.Module, plan: Mapping[str, str]) -> tuple[str, ...]:
    """Return the keys that match nothing, and refuse those that no class of the model's modules could create.

    An entry may rightly match nothing in this configuration: dense-layer entries of a model whose layers are all
    sparse, say. Then another configuration of the same classes would have what its key names.

    Raises:
        UnmatchedKeyError: no configuration would.
    """
    names = [name for name, _ in (*model.named_modules(), *model.named_parameters(remove_duplicate=False))]
    unmatched = tuple(key for key in find_unmatched_keys(plan, names) if not _is_duplicate_key(model, plan, key))
    for key in unmatched:
        unknown = find_unknown_part(model, key)
        if unknown is not None:
            part, parent = unknown
            raise UnmatchedKeyError(
                f"the plan entry {key!r} matches nothing in {type(model).__name__}: no class that {parent or 'it'!r} "
                f"may be creates {part!r}",
                hint="correct or remove the entry",
                key=key,
            )
    return unmatched


def _is_duplicate_key(model: nn.Module, plan: Mapping[str, str], key: str) -> bool:
    """Say whether the key is another one that lost its prefix.

    Where a model, or one inside it, holds its base model under another name than its class says, transformers takes it
    for a base model itself and adds the config's entries a second time, as they stand there.
    """
    inner = (name for name, module in model.named_modules() if name and hasattr(module, "base_model"))
    return any(_strip_inner_model_name(name, other) == key for name in inner for other in plan)


def _strip_inner_model_name(name: str, key: str) -> str | None:
    """Return a key below a model inside a model as it reads without that model's own name, None for other keys."""
    owner, _, _ = name.rpartition(".")
    return f"{owner}.{key.removeprefix(f'{name}.')}".lstrip(".") if key.startswith(f"{name}.") else None


def check_divisible(
    model: nn.Module,
    mesh: Mesh,
    plan: Mapping[str, str],
    dialect: Dialect,
    parameters: tuple[ResolvedParameter, ...],
) -> None:
    """Refuse sizes that would cut a packed group or an attention head, naming the sizes that work.

    Raises:
        IndivisibleError: an axis does not divide one of them.
    """
    over_tp = {**_get_packed_sizes(parameters), **_count_heads(model, plan, dialect)}
    for axis, size, counts in (("tp", mesh.tp, over_tp), ("ep", mesh.ep, _count_experts(parameters))):
        failing = [(what, count) for what, count in counts.items() if count % size]
        if failing:
            what, count = failing[0]
            works = [one for one in range(1, min(counts.values()) + 1) if not any(n % one for n in counts.values())]
            raise IndivisibleError(
                f"{axis}={size} does not divide {what}, {count}",
                hint="sizes that work: " + ", ".join(map(str, works)),
                what=what,
                size=count,
                works=works,
            )


def check_packed_experts(model: nn.Module, parameters: tuple[ResolvedParameter, ...]) -> None:
    """Refuse placements by which a rank's slices would not hold gates together with their ups, and what takes both.

    Shapes often fit either way, so that nothing but the numbers would show it.

    Raises:
        PlanError: gate and up lie one after the other and are cut as one, or alternate and are cut as two, or the
            layer behind them is cut otherwise than they are.
    """
    for parameter in parameters:
        owner, _, name = parameter.name.rpartition(".")
        layout = (
            read_expert_layout(owner, model.get_submodule(owner)) if name in ("gate_up_proj", "down_proj") else None
        )
        if layout is None or not layout.gated:
            continue
        right, why = _get_gate_up_placement(layout) if name == "gate_up_proj" else _get_down_placement(layout)
        if parameter.placements[-1] not in (Replicate(), Shard(0), right):
            raise PlanError(
                f"{parameter.name}: {parameter.style!r} makes it {parameter.placements[-1]}, but {why}",
                hint=f"choose a style that makes it {right}, or expert parallelism",
                parameter=parameter.name,
            )


def _get_gate_up_placement(layout: ExpertLayout) -> tuple[Placement, str]:
    dim = 2 if layout.transposed else 1
    lie = "lie one after the other" if layout.concatenated else "alternate"
    why = f"gate and up {lie} there: no rank's slice would hold gates together with their ups"
    return (Packed(dim, 2) if layout.concatenated else Shard(dim)), why


def _get_down_placement(layout: ExpertLayout) -> tuple[Placement, str]:
    return Shard(1 if layout.transposed else 2), "what each rank's gates and ups compute is one run of its inputs"


def check_stacked_experts(parameters: tuple[ResolvedParameter, ...]) -> None:
    """Refuse half a plan for stacked experts: whole parameters beside sliced ones, whose widths would not fit.

    Raises:
        PlanError: of one module's stacked parameters some are cut and others whole.
    """
    stacked: dict[str, list[ResolvedParameter]] = {}
    for row in parameters:
        if row.kind == "parameter" and len(row.shape) > 2:
            stacked.setdefault(row.name.rpartition(".")[0], []).append(row)
    for owner, rows in stacked.items():
        whole = [row.name for row in rows if row.placements[-1] == Replicate()]
        if 0 < len(whole) < len(rows):
            raise PlanError(
                f"{whole[0]} is whole, but the plan cuts other parameters of {owner}, which would not fit it",
                hint=f"add an entry for {to_wildcard(whole[0])!r}, or remove those of the others",
                parameter=whole[0],
            )


def _count_experts(parameters: tuple[ResolvedParameter, ...]) -> dict[str, int]:
    return {
        f"the experts of {to_wildcard(parameter.name)}": parameter.shape[0]
        for parameter in parameters
        if parameter.mesh == "experts" and parameter.placements[-1] == Shard(0) and len(parameter.shape) > 2
    }


def _get_packed_sizes(parameters: tuple[ResolvedParameter, ...]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for parameter in parameters:
        placement = parameter.placements[-1]
        if isinstance(placement, Packed):
            size = parameter.shape[placement.dim] // placement.groups
            sizes[f"the intermediate size of {to_wildcard(parameter.name)}"] = size
    return sizes


def _count_heads(model: nn.Module, plan: Mapping[str, str], dialect: Dialect) -> dict[str, int]:
    """Count the heads of every projection whose output the plan leaves sharded: those must be whole on each rank."""
    counts: dict[str, int] = {}
    for name, module in model.named_modules():
        key = find_key(plan, name, is_parameter=False)
        if key is None or not isinstance(module, nn.Linear):
            continue
        style = dialect.style(plan[key], key)
        if style.output == "sharded" and isinstance(style.placement("linear", 2, "weight"), Shard):
            owner, _, projection = name.rpartition(".")
            heads = _count_projection_heads(model.get_submodule(owner), projection, module)
            if heads is not None:
                counts[f"the heads of {key}"] = heads
    return counts


def _count_projection_heads(attention: nn.Module, projection: str, module: nn.Linear) -> int | None:
    """Count the heads in an attention projection's output, None where it holds none."""
    head_dim: Any = getattr(attention, "head_dim", None)
    if projection in ("q_proj", "k_proj", "v_proj") and isinstance(head_dim, int):
        return module.out_features // head_dim
    if projection in ("q_proj", "q_b_proj", "kv_b_proj", "query_key_value"):
        config: Any = getattr(attention, "config", None)
        count: Any = getattr(attention, "num_heads", None) or getattr(config, "num_attention_heads", None)
        return count if isinstance(count, int) else None
    return None


_NUMBER = re.compile(r"(^|\.)\d+(\.|$)")


def check_entries(plan: Mapping[str, str], dialect: Dialect, styles: StyleRegistry) -> None:
    """Refuse entries that no model could follow.

    Args:
        plan: key to style.
        dialect: that it is written in.
        styles: those that can run.

    Raises:
        UsageError: a key or a style is no text.
        PlanError: a key is empty, or mixes numbers and wildcards.
        UnknownStyleError: the dialect has no such style.
    """
    for key, style in plan.items():
        _check_key(key, style)
        if style not in dialect.styles:
            able = [name for name in styles.names if name in dialect.styles]
            raise UnknownStyleError(
                f"{key!r}: the dialect {dialect.name} has no style {style!r}",
                hint=suggest_style(style, able, "styles that can run: " + ", ".join(able)),
                key=key,
                style=style,
                dialect=dialect.name,
            )


def check_model(model: object) -> None:
    """Refuse what is no model with a config, on which no plan can be resolved.

    Raises:
        UsageError: it is none.
    """
    if not isinstance(model, nn.Module) or getattr(model, "config", None) is None:
        kind = model.__name__ if isinstance(model, type) else type(model).__name__
        raise UsageError(
            f"{kind} is no transformers model with a config",
            hint="pass a model, built from its config or loaded by from_pretrained",
            model=kind,
        )


def _check_key(key: object, style: object) -> None:
    if not (isinstance(key, str) and isinstance(style, str)):
        raise UsageError(
            f"a plan is key to style, both text, and not {key!r}: {style!r}",
            hint="write keys as the model's names are, 'model.layers.*.mlp.up_proj', and styles as 'colwise'",
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
