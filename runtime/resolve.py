"""The resolved plan of a model built on meta: which entry decides for each parameter, and where that puts it."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from plans.decompose import apply_edits, decompose
from plans.dialect import PARAM_LEVEL, Dialect, dialect_for_release, load_dialect
from plans.errors import IndivisibleError, PlanError, UnmatchedKeyError, UsageError
from plans.layout import ExpertLayout
from plans.mesh import Mesh, Mode
from plans.placement import Packed, Placement, Replicate, Shard
from plans.plan import lookup, unmatched_keys, wildcard
from plans.resolved import Kind, ResolvedParameter, ResolvedPlan
from plans.style import Owner
from runtime.model import dtype_name, transformers_version

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["param_level_plan", "released_plan", "resolve", "runtime_dialect"]


def runtime_dialect() -> Dialect:
    """Return what plans may say here: the installed transformers' dialect with the param-level one laid over it."""
    return dialect_for_release(transformers_version()).overlaid(load_dialect(PARAM_LEVEL))


def released_plan(model: PreTrainedModel) -> dict[str, str]:
    """Return the TP plan as the installed transformers would apply it, keys prefixed as the model's names are.

    Raises:
        PlanError: the model has none.
    """
    plan = dict(model.tp_plan or {})
    if not plan:
        raise PlanError(
            f"{type(model).__name__} has no tensor parallel plan",
            hint="its config needs a `base_model_tp_plan`",
            model=type(model).__name__,
        )
    return plan


def param_level_plan(model: PreTrainedModel, plan: Mapping[str, str]) -> dict[str, str]:
    """Return a plan's param-level form, where the model's own experts have the layout that it describes."""
    layouts = {wildcard(name): _layout(name, module) for name, module in model.named_modules()}
    return apply_edits(plan, decompose(plan, layouts.get).edits)


def resolve(
    model: PreTrainedModel, mesh: Mesh, mode: Mode = "tp", plan: Mapping[str, str] | None = None
) -> ResolvedPlan:
    """Resolve a plan on a model.

    Args:
        model: built on meta or not; nothing of its data is read.
        mesh: the sizes of the mesh axes.
        mode: `tp` only.
        plan: by default the param-level form of the model's own TP plan.

    Raises:
        UnknownStyleError: an entry names a style that neither the release nor the param-level dialect has.
        UnmatchedKeyError: an entry names nothing that the model's classes could create.
        IndivisibleError: a packed parameter or the attention heads do not divide by the mesh axis.
        PlanError: the model has no plan, or entries of tied parameters contradict each other.
    """
    if mode != "tp":
        raise UsageError(f"mode {mode!r} is not built yet", hint="use --tp alone")
    dialect = runtime_dialect()
    chosen = dict(plan) if plan is not None else param_level_plan(model, released_plan(model))
    for key, style in chosen.items():
        dialect.style(style, key)
    _check_unmatched(model, chosen)
    parameters = tuple(_resolve_tensors(model, mesh, chosen, dialect))
    _check_divisible(model, mesh, chosen, dialect, parameters)
    return ResolvedPlan(str(model.config.model_type), mode, dialect.name, mesh, chosen, parameters)


def _resolve_tensors(
    model: nn.Module, mesh: Mesh, plan: Mapping[str, str], dialect: Dialect
) -> Iterator[ResolvedParameter]:
    modules = dict(model.named_modules())
    persistent = set(model.state_dict(keep_vars=True))
    tied = _tied_names(model)
    tensors: list[tuple[Kind, str, torch.Tensor]] = [
        *(("parameter", name, tensor) for name, tensor in model.named_parameters(remove_duplicate=False)),
        *(("buffer", name, tensor) for name, tensor in model.named_buffers() if name in persistent),
    ]
    seen: dict[str, ResolvedParameter] = {}
    for kind, name, tensor in sorted(tensors, key=lambda row: row[1] in tied):
        found = _resolve_tensor(kind, name, tensor, modules[name.rpartition(".")[0]], mesh, plan, dialect)
        if name in tied:
            found = _as_tied(found, seen[tied[name]])
        seen[name] = found
    yield from (seen[name] for _, name, _ in tensors)


def _resolve_tensor(
    kind: Kind,
    name: str,
    tensor: torch.Tensor,
    module: nn.Module,
    mesh: Mesh,
    plan: Mapping[str, str],
    dialect: Dialect,
) -> ResolvedParameter:
    key = lookup(plan, name, is_parameter=True) if kind == "parameter" else None
    style = plan[key] if key is not None else None
    placement: Placement | None = None
    if key is not None and style is not None:
        placement = dialect.style(style, key).placement(_owner(module), tensor.ndim, name.rpartition(".")[2])
    return ResolvedParameter(
        name=name,
        kind=kind,
        dtype=dtype_name(tensor.dtype),
        shape=tuple(tensor.shape),
        mesh="dense",
        placements=_on_axes(mesh, placement),
        key=key,
        style=style,
        reason=_reason(kind, name, key, style, placement),
    )


def _on_axes(mesh: Mesh, placement: Placement | None) -> tuple[Placement, ...]:
    assert mesh.world_size == mesh.tp, "FSDP and expert axes are refused before this"
    return (Replicate(), placement or Replicate())


def _reason(kind: Kind, name: str, key: str | None, style: str | None, placement: Placement | None) -> str:
    if kind == "buffer":
        return "buffers stay whole"
    if key is None:
        return "no plan entry"
    whose = "its own entry" if wildcard(name) == key else "its module's entry"
    return f"{whose}, {style}" + ("" if placement else ", shards nothing")


def _as_tied(found: ResolvedParameter, target: ResolvedParameter) -> ResolvedParameter:
    if found.placements != target.placements:
        raise PlanError(
            f"{found.name} and {target.name} are one tensor, but the plan puts it at {found.placements[-1]} "
            f"by {found.key!r} and at {target.placements[-1]} by {target.key!r}",
            hint="give both entries styles with one placement, or untie the weights",
            names=[found.name, target.name],
        )
    return ResolvedParameter(
        **{
            **{name: getattr(found, name) for name in found.__dataclass_fields__},
            "kind": "tied",
            "reason": f"the same tensor as {target.name}",
            "tied_to": target.name,
        }
    )


def _tied_names(model: nn.Module) -> dict[str, str]:
    """Return each tied name with the name that holds the bytes, the one transformers calls the source."""
    declared = dict(getattr(model, "all_tied_weights_keys", None) or {})
    holders: dict[int, str] = {}
    tied: dict[str, str] = {}
    rows = sorted(model.named_parameters(remove_duplicate=False), key=lambda row: row[0] in declared)
    for name, tensor in rows:
        holder = holders.setdefault(id(tensor), name)
        if holder != name:
            tied[name] = holder
    return tied


def _owner(module: nn.Module) -> Owner:
    if isinstance(module, nn.Embedding):
        return "embedding"
    return "linear" if isinstance(module, nn.Linear) else "module"


def _layout(name: str, module: nn.Module) -> ExpertLayout | None:
    """Read an experts module's layout from its parameters' shapes and the flags its class was decorated with."""
    down = getattr(module, "down_proj", None)
    packed = getattr(module, "gate_up_proj", None)
    if not (isinstance(down, torch.Tensor) and down.ndim == 3):
        return None
    where = f"{type(module).__name__} at {name}"
    if not isinstance(packed, torch.Tensor):
        return ExpertLayout(where, gated=False)
    regular = packed.ndim == 3 and packed.shape[1] == 2 * down.shape[2] and packed.shape[2] == down.shape[1]
    return ExpertLayout(
        where,
        gated=bool(getattr(module, "has_gate", True)),
        transposed=bool(getattr(module, "is_transposed", False)) or not regular,
        concatenated=bool(getattr(module, "is_concatenated", True)),
        biased=bool(getattr(module, "has_bias", False)),
    )


def _check_unmatched(model: nn.Module, plan: Mapping[str, str]) -> None:
    """Refuse entries that no class of the model's modules could create.

    An entry may rightly match nothing in this configuration: dense-layer entries of a model whose layers are all
    sparse, say. Then each part of its key is at least an attribute that the model's modeling source assigns.
    """
    names = [name for name, _ in (*model.named_modules(), *model.named_parameters(remove_duplicate=False))]
    unmatched = unmatched_keys(plan, names)
    if not unmatched:
        return
    known = {part for name in names for part in name.split(".")} | _assigned_attributes(model)
    for key in unmatched:
        unknown = [part for part in key.split(".") if part != "*" and part not in known]
        if unknown:
            raise UnmatchedKeyError(
                f"the plan entry {key!r} matches nothing in {type(model).__name__}, which has no {unknown[0]!r}",
                hint="correct or remove the entry",
                key=key,
            )


def _assigned_attributes(model: nn.Module) -> set[str]:
    modules = {type(module).__module__ for module in model.modules()}
    sources = (inspect.getsource(sys.modules[name]) for name in modules if name.startswith("transformers."))
    return {match for source in sources for match in re.findall(r"self\.(\w+)\s*(?::[^=\n]+)?=", source)}


def _check_divisible(
    model: nn.Module,
    mesh: Mesh,
    plan: Mapping[str, str],
    dialect: Dialect,
    parameters: tuple[ResolvedParameter, ...],
) -> None:
    """Refuse sizes that would cut a packed group or an attention head, naming the sizes that work."""
    sizes = {**_packed_sizes(parameters), **_head_counts(model, plan, dialect)}
    failing = [(what, size) for what, size in sizes.items() if size % mesh.tp]
    if failing:
        what, size = failing[0]
        limit = min(sizes.values())
        works = [tp for tp in range(1, limit + 1) if all(size % tp == 0 for size in sizes.values())]
        raise IndivisibleError(
            f"tp={mesh.tp} does not divide {what}, {size}",
            hint="sizes that work: " + ", ".join(str(tp) for tp in works),
            what=what,
            size=size,
            works=works,
        )


def _packed_sizes(parameters: tuple[ResolvedParameter, ...]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for parameter in parameters:
        for placement in parameter.placements:
            if isinstance(placement, Packed):
                size = parameter.shape[placement.dim] // placement.groups
                sizes[f"the intermediate size of {wildcard(parameter.name)}"] = size
    return sizes


def _head_counts(model: nn.Module, plan: Mapping[str, str], dialect: Dialect) -> dict[str, int]:
    """Count the heads of every projection whose output the plan leaves sharded: those must be whole on each rank."""
    counts: dict[str, int] = {}
    for name, module in model.named_modules():
        head_dim: Any = getattr(module, "head_dim", None)
        if not isinstance(head_dim, int):
            continue
        for child in ("q_proj", "k_proj", "v_proj"):
            projection = getattr(module, child, None)
            key = lookup(plan, f"{name}.{child}", is_parameter=False)
            if key is None or not isinstance(projection, nn.Linear):
                continue
            style = dialect.style(plan[key], key)
            if style.output == "sharded" and isinstance(style.placement("linear", 2, "weight"), Shard):
                counts[f"the heads of {key}"] = projection.out_features // head_dim
    return counts
