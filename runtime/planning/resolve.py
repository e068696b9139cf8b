"""The resolved plan of a model built on meta: which entry decides for each parameter, and where that puts it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from plans.dialect import Dialect
from plans.errors import PlanError
from plans.mesh import Mesh, MeshName, Mode
from plans.placement import Packed, Placement, Replicate, Shard
from plans.plan import find_key, to_wildcard
from plans.resolved_plan import ParameterKind, ResolvedParameter, ResolvedPlan
from plans.style import Style
from runtime.checks.plan import (
    check_divisible,
    check_entries,
    check_mode,
    check_model,
    check_packed_experts,
    check_stacked_experts,
    check_unmatched_entries,
)
from runtime.models.dtypes import dtype_name
from runtime.models.model import find_tied_names, model_tensors, tensor_kind
from runtime.planning.plan import Plan, runtime_dialect
from runtime.planning.scales import Scale, check_scale_blocks, find_scales
from runtime.styles.registry import STYLES, StyleRegistry
from runtime.styles.style import get_owner_kind

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["place_tensors", "resolve"]


def resolve(
    model: PreTrainedModel,
    mesh: Mesh,
    mode: Mode = "tp",
    plan: Plan | Mapping[str, str] | None = None,
    styles: StyleRegistry = STYLES,
) -> ResolvedPlan:
    """Resolve a plan on a model.

    Args:
        model: built on meta or not; nothing of its data is read.
        mesh: the sizes of the mesh axes.
        mode: which of the model's plans apply, where `plan` does not say.
        plan: by default the one that `Plan.from_model` chooses for the mode.
        styles: those that the plan may name.

    Raises:
        UsageError: the mode does not go with the mesh, or the model is none of transformers'.
        UnknownStyleError: an entry names a style that neither the release nor the param-level dialect has.
        UnmatchedKeyError: an entry names nothing that the model's classes could create.
        IndivisibleError: a packed parameter, the attention heads or the experts do not divide by their mesh axis, or
            it would cut a quantized weight within a block that has one scale.
        PlanError: the model has no plan, entries of tied parameters contradict each other, FSDP would cut a packed
            parameter, or experts would be cut across gate and up or in part only.
    """
    check_model(model)
    chosen = plan if isinstance(plan, Plan) else Plan.from_model(model, mode, plan)
    check_mode(chosen.mode, mesh)
    dialect = styles.dialect(runtime_dialect())
    check_entries(chosen.entries, dialect, styles)
    scales = find_scales(model)
    packed = {find_key(chosen.entries, scale.weight, is_parameter=True) for scale in scales.values()}
    unmatched = check_unmatched_entries(
        model, {key: chosen.entries[key] for key in chosen.entries if key not in packed}
    )
    parameters = tuple(_resolve_tensors(model, mesh, chosen, dialect, scales))
    check_scale_blocks(mesh, parameters, scales)
    weights = tuple(row for row in parameters if row.name not in scales)
    check_divisible(model, mesh, chosen.entries, dialect, weights)
    check_stacked_experts(weights)
    check_packed_experts(model, parameters)
    return ResolvedPlan(
        str(model.config.model_type), chosen.mode, dialect.name, mesh, chosen.entries, parameters, unmatched
    )


def place_tensors(model: PreTrainedModel, plan: Plan) -> tuple[ResolvedParameter, ...]:
    """Return where a plan puts each tensor, whether or not the model could compute with it there.

    That is for reading what another stack has cut already: its data parallel ranks repeat tensors and cut none.

    Args:
        model: built on meta or not.
        plan: whose keys may also name nothing.

    Raises:
        UnknownStyleError: an entry names a style that neither the release nor the param-level dialect has.
        PlanError: a key is not well-formed, or entries of tied parameters contradict each other.
    """
    dialect = STYLES.dialect(runtime_dialect())
    check_entries(plan.entries, dialect, STYLES)
    return tuple(_resolve_tensors(model, Mesh(), plan, dialect, find_scales(model)))


def _resolve_tensors(
    model: nn.Module, mesh: Mesh, plan: Plan, dialect: Dialect, scales: Mapping[str, Scale]
) -> Iterator[ResolvedParameter]:
    modules = dict(model.named_modules())
    tied = find_tied_names(model)
    tensors = model_tensors(model)
    seen: dict[str, ResolvedParameter] = {}
    for name in sorted(tensors, key=lambda name: name in tied):
        owner = modules[name.rpartition(".")[0]]
        found = _resolve_tensor(name, tensors, owner, mesh, plan, dialect, scales.get(name))
        if name in tied:
            found = _resolve_tied(found, seen[tied[name]])
        seen[name] = found
    yield from (seen[name] for name in tensors)


def _resolve_tensor(
    name: str,
    tensors: Mapping[str, torch.Tensor],
    module: nn.Module,
    mesh: Mesh,
    plan: Plan,
    dialect: Dialect,
    scale: Scale | None,
) -> ResolvedParameter:
    tensor = tensors[name]
    kind = tensor_kind(tensor)
    decided = scale.weight if scale else name
    key = find_key(plan.entries, decided, is_parameter=True) if kind == "parameter" else None
    placement = (
        None if key is None else _resolve_placement(tensors, name, module, dialect.style(plan.entries[key], key), scale)
    )
    over: MeshName = "experts" if placement not in (None, Replicate()) and key in plan.expert_keys else "dense"
    inner = placement or Replicate()
    return ResolvedParameter(
        name=name,
        kind=kind,
        dtype=dtype_name(tensor.dtype),
        shape=tuple(tensor.shape),
        mesh=over,
        placements=(
            _resolve_fsdp_placement(mesh, over, name, tensor, inner) if kind == "parameter" else Replicate(),
            inner,
        ),
        key=key,
        style=None if key is None else plan.entries[key],
        reason="goes with its weight" if scale else _explain_placement(kind, name, key, placement),
    )


def _resolve_placement(
    tensors: Mapping[str, torch.Tensor], name: str, module: nn.Module, style: Style, scale: Scale | None
) -> Placement | None:
    """Return where a style puts a parameter, or the weight whose scale it is, and so the scale."""
    tensor, decided = tensors[name], scale.weight if scale else name
    placement = style.placement(get_owner_kind(module), tensors.get(decided, tensor).ndim, decided.rpartition(".")[2])
    return scale.placement(placement, tensor.ndim) if scale and placement else placement


def _resolve_fsdp_placement(
    mesh: Mesh, mesh_name: MeshName, name: str, tensor: torch.Tensor, inner_placement: Placement
) -> Placement:
    """Return the placement on the data parallel axis: dim 0 of what the inner axis left, as `fully_shard` cuts.

    Raises:
        PlanError: dim 0 holds packed groups, which FSDP would cut across.
    """
    if mesh.sizes(mesh_name)[0] == 1 or not tensor.ndim:
        return Replicate()
    if isinstance(inner_placement, Packed) and inner_placement.dim == 0:
        raise PlanError(
            f"{name} is {inner_placement}, whose groups FSDP would cut across",
            hint="set `fsdp=1`, or use a plan that does not pack dim 0",
            parameter=name,
        )
    return Shard(0)


def _explain_placement(kind: ParameterKind, name: str, key: str | None, placement: Placement | None) -> str:
    if kind == "buffer":
        return "buffers stay whole"
    if key is None:
        return "no plan entry"
    whose = "its own entry" if key in (name, to_wildcard(name)) else "its module's entry"
    return whose if placement else f"{whose}, which shards nothing"


def _resolve_tied(parameter: ResolvedParameter, target: ResolvedParameter) -> ResolvedParameter:
    if parameter.placements != target.placements:
        raise PlanError(
            f"{parameter.name} and {target.name} are one tensor, but the plan puts it at {parameter.placements[-1]} "
            f"by {parameter.key!r} and at {target.placements[-1]} by {target.key!r}",
            hint="give both entries styles with one placement, or untie the weights",
            names=[parameter.name, target.name],
        )
    return replace(parameter, kind="tied", reason=f"the same tensor as {target.name}", tied_to=target.name)
