"""The resolved plan of a model built on meta: which entry applies to each parameter, and where it goes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from plans.dialect import Dialect
from plans.errors import PlanError
from plans.mesh import Mesh, MeshName, Mode
from plans.placement import Packed, Placement, Replicate, Shard
from plans.plan import find_key, to_wildcard
from plans.resolved_plan import ParameterKind, ResolvedParameter, ResolvedPlan
from runtime.checks.experts import check_packed_experts, check_stacked_experts
from runtime.checks.plan import check_divisible, check_entries, check_mode, check_model, check_unmatched_entries
from runtime.checks.plan_view import PlanView
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
        model: the model, on meta or not; none of its data is read.
        mesh: the sizes of the mesh axes.
        mode: the mode to choose a plan for; a `Plan` brings its own.
        plan: the plan; by default the one that `Plan.from_model` chooses for the mode.
        styles: the styles that the plan may name.

    Raises:
        UsageError: the mode does not fit the mesh, or the model is not a transformers model.
        UnknownStyleError: an entry names a style that neither the release nor the param-level dialect has.
        UnmatchedKeyError: an entry names nothing that the model's classes could create.
        IndivisibleError: a mesh axis does not divide a packed parameter, the attention heads or the experts, or would
            cut a quantized weight within a block that has one scale.
        PlanError: the model has no plan, entries of tied parameters contradict each other, FSDP would cut a packed
            parameter, or experts would be sharded across gate and up or only in part.
    """
    check_model(model)
    chosen = plan if isinstance(plan, Plan) else Plan.from_model(model, mode, plan)
    check_mode(chosen.mode, mesh)
    view = PlanView(model, chosen.entries, styles.dialect(runtime_dialect()), styles)
    check_entries(view)
    scales = find_scales(model)
    quantized_keys = {find_key(chosen.entries, scale.weight, is_parameter=True) for scale in scales.values()}
    unquantized = {key: style for key, style in chosen.entries.items() if key not in quantized_keys}
    unmatched = check_unmatched_entries(model, unquantized)
    parameters = tuple(_resolve_tensors(model, mesh, chosen, view.dialect, scales))
    check_scale_blocks(mesh, parameters, scales)
    weights = tuple(parameter for parameter in parameters if parameter.name not in scales)
    check_divisible(view, mesh, weights)
    check_stacked_experts(weights)
    check_packed_experts(model, parameters)
    return ResolvedPlan(
        str(model.config.model_type), chosen.mode, view.dialect.name, mesh, chosen.entries, parameters, unmatched
    )


def place_tensors(model: PreTrainedModel, plan: Plan) -> tuple[ResolvedParameter, ...]:
    """Return where a plan puts each tensor, whether or not the model could compute with it there.

    This serves to read what another stack has sharded: its data parallel ranks repeat tensors and shard none.

    Args:
        model: the model, on meta or not.
        plan: the plan; its keys may also match nothing.

    Raises:
        UnknownStyleError: an entry names a style that neither the release nor the param-level dialect has.
        PlanError: a key is not well-formed, or entries of tied parameters contradict each other.
    """
    view = PlanView(model, plan.entries, STYLES.dialect(runtime_dialect()))
    check_entries(view)
    return tuple(_resolve_tensors(model, Mesh(), plan, view.dialect, find_scales(model)))


def _resolve_tensors(
    model: nn.Module, mesh: Mesh, plan: Plan, dialect: Dialect, scales: Mapping[str, Scale]
) -> Iterator[ResolvedParameter]:
    tied = find_tied_names(model)
    resolver = _TensorResolver(model_tensors(model), mesh, plan, dialect, scales)
    resolved: dict[str, ResolvedParameter] = {}
    for name in sorted(resolver.tensors, key=lambda name: name in tied):
        resolved[name] = resolver.resolve(name, model.get_submodule(name.rpartition(".")[0]))
        if name in tied:
            resolved[name] = _resolve_tied(resolved[name], resolved[tied[name]])
    yield from (resolved[name] for name in resolver.tensors)


def _resolve_tied(parameter: ResolvedParameter, target: ResolvedParameter) -> ResolvedParameter:
    if parameter.placements != target.placements:
        raise PlanError(
            f"{parameter.name} and {target.name} are one tensor, but the plan puts it at {parameter.placements[-1]} "
            f"by {parameter.key!r} and at {target.placements[-1]} by {target.key!r}",
            hint="give both entries styles with one placement, or untie the weights",
            names=[parameter.name, target.name],
        )
    return replace(parameter, kind="tied", reason=f"the same tensor as {target.name}", tied_to=target.name)


@dataclass(frozen=True)
class _TensorResolver:
    """Resolves the tensors of one model one by one.

    Args:
        tensors: the model's tensors by name.
        mesh: the sizes of the mesh axes.
        plan: the plan.
        dialect: the dialect that the plan is written in.
        scales: the scales of quantized weights, by name.
    """

    tensors: Mapping[str, torch.Tensor]
    mesh: Mesh
    plan: Plan
    dialect: Dialect
    scales: Mapping[str, Scale]

    def resolve(self, name: str, owner: nn.Module) -> ResolvedParameter:
        """Resolve a tensor.

        Args:
            name: the tensor's name in the model.
            owner: the module that owns the tensor.
        """
        tensor, scale = self.tensors[name], self.scales.get(name)
        kind = tensor_kind(tensor)
        keyed_name = scale.weight if scale else name
        key = find_key(self.plan.entries, keyed_name, is_parameter=True) if kind == "parameter" else None
        placement = None if key is None else self._find_placement(name, owner, key)
        inner = placement or Replicate()
        over: MeshName = "experts" if inner != Replicate() and key in self.plan.expert_keys else "dense"
        outer = self._find_fsdp_placement(name, over, inner) if kind == "parameter" else Replicate()
        return ResolvedParameter(
            name=name,
            kind=kind,
            dtype=dtype_name(tensor.dtype),
            shape=tuple(tensor.shape),
            mesh=over,
            placements=(outer, inner),
            key=key,
            style=None if key is None else self.plan.entries[key],
            reason="goes with its weight" if scale else _explain_placement(kind, name, key, placement),
        )

    def _find_placement(self, name: str, owner: nn.Module, key: str) -> Placement | None:
        """Return where an entry puts a parameter; a scale goes where the entry puts its weight."""
        tensor, scale = self.tensors[name], self.scales.get(name)
        weight = scale.weight if scale else name
        ndim = self.tensors.get(weight, tensor).ndim
        style = self.dialect.style(self.plan.entries[key], key)
        placement = style.placement(get_owner_kind(owner), ndim, weight.rpartition(".")[2])
        return scale.placement(placement, tensor.ndim) if scale and placement else placement

    def _find_fsdp_placement(self, name: str, over: MeshName, inner: Placement) -> Placement:
        """Return the placement on the data parallel axis: dim 0 of what the inner axis left, as `fully_shard` cuts.

        Raises:
            PlanError: dim 0 holds packed groups, which FSDP would cut across.
        """
        if self.mesh.sizes(over)[0] == 1 or not self.tensors[name].ndim:
            return Replicate()
        if isinstance(inner, Packed) and inner.dim == 0:
            raise PlanError(
                f"{name} is {inner}, whose groups FSDP would cut across",
                hint="set `fsdp=1`, or use a plan that does not pack dim 0",
                parameter=name,
            )
        return Shard(0)


def _explain_placement(kind: ParameterKind, name: str, key: str | None, placement: Placement | None) -> str:
    if kind == "buffer":
        return "buffers stay whole"
    if key is None:
        return "no plan entry"
    entry = "its own entry" if key in (name, to_wildcard(name)) else "its module's entry"
    return entry if placement else f"{entry}, which shards nothing"
