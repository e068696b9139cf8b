"""The resolved plan of a model on meta: which entry applies to each parameter and its scales, and where they go."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from plans.dialect import Dialect
from plans.errors import IndivisibleError, PlanError
from plans.mesh import Mesh, MeshName, Mode
from plans.placement import Packed, Placement, Replicate, Shard
from plans.plan import find_key, to_wildcard
from plans.resolved_plan import ParameterKind, ResolvedParameter, ResolvedPlan
from runtime.checks.entry_effects import check_entry_effects, check_unmatched_entries
from runtime.checks.experts import check_packed_experts, check_stacked_experts
from runtime.checks.fused_layers import check_fused_layers
from runtime.checks.plan import check_divisible, check_entries, check_mode, check_model
from runtime.checks.plan_view import PlanView
from runtime.models.dtypes import dtype_name
from runtime.models.model import find_tied_names, model_tensors, tensor_kind
from runtime.models.quantized import PackedExperts
from runtime.planning.plan import Plan, runtime_dialect
from runtime.planning.stages import find_stages
from runtime.styles.registry import STYLES, StyleRegistry
from runtime.styles.style import get_owner_kind
from runtime.tensor_map.tensor_map import chunk_bounds

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Scale", "check_scale_blocks", "find_scales", "place_tensors", "resolve"]


_SCALE = re.compile(r"(?:(?P<weight>\w+?)_)??(?P<kind>activation_scale|scale_inv|scale|scales|blocks)")
_FP4_BLOCK = 1, 16
"""The rows, and the bytes of two values each, that share one scale."""


@dataclass(frozen=True, slots=True)
class Scale:
    """A tensor that is placed with its weight.

    Args:
        weight: the weight's name, which plan entries match.
        block: how many of the weight's elements, by tensor dim, one element scales; None if it scales all of them.
    """

    weight: str
    block: tuple[int, ...] | None

    def placement(self, weight_placement: Placement, ndim: int) -> Placement:
        """Return the scale's placement.

        Args:
            weight_placement: the weight's placement.
            ndim: the scale's number of dims.
        """
        is_sharded = self.block is not None or (weight_placement == Shard(0) and ndim > 0)
        return weight_placement if is_sharded else Replicate()


def find_scales(model: nn.Module) -> dict[str, Scale]:
    """Return a model's scales by name, among them the blocks that a quantizer put in the place of weights.

    Args:
        model: a model built by `runtime.models.quantized.build_stored_model`.
    """
    scales: dict[str, Scale] = {}
    for owner, module in model.named_modules():
        if not (isinstance(module, PackedExperts) or type(module).__name__.startswith("FP8")):
            continue
        for name, tensor in module.named_parameters(recurse=False):
            match = _SCALE.fullmatch(name)
            if match:
                weight = match["weight"] or "weight"
                block = _get_block_shape(module, weight, match["kind"], tensor)
                scales[f"{owner}.{name}"] = Scale(f"{owner}.{weight}", block)
    return scales


def check_scale_blocks(mesh: Mesh, parameters: Sequence[ResolvedParameter], scales: Mapping[str, Scale]) -> None:
    """Check that no weight is cut within a block that has one scale.

    FSDP may cut there: it gathers the weight before anything is computed.

    Args:
        mesh: the sizes of the mesh axes.
        parameters: the model's resolved parameters.
        scales: the model's scales by name.

    Raises:
        IndivisibleError: tensor or expert parallelism would cut there; names the sizes that work.
    """
    by_name = {parameter.name: parameter for parameter in parameters}
    scaled_weights = [
        _ScaledWeight(by_name[scale.weight], by_name[name], scale.block)
        for name, scale in scales.items()
        if scale.block and scale.weight in by_name
    ]
    for kind in ("dense", "experts"):
        axis, size = mesh.axes(kind)[1], mesh.sizes(kind)[1]
        on_axis = [weight for weight in scaled_weights if weight.weight.mesh == kind]
        failing = [weight for weight in on_axis if not weight.is_aligned(size)]
        if failing:
            largest = max(max(weight.scale.shape) for weight in on_axis)
            works = [n for n in range(1, largest + 1) if all(weight.is_aligned(n) for weight in on_axis)]
            raise IndivisibleError(
                f"{axis}={size} would cut {failing[0].weight.name}, {list(failing[0].weight.shape)}, within blocks of "
                f"{list(failing[0].block)} that have one scale each",
                hint="sizes that work: " + ", ".join(map(str, works)),
                name=failing[0].weight.name,
                works=works,
            )


@dataclass(frozen=True)
class _ScaledWeight:
    """A weight, its scale, and how many of the weight's elements, by tensor dim, share one element of the scale."""

    weight: ResolvedParameter
    scale: ResolvedParameter
    block: tuple[int, ...]

    def is_aligned(self, size: int) -> bool:
        """Return whether the chunks of the weight begin where those of the scale do, on a mesh axis of this size."""
        match self.weight.placements[-1]:
            case Shard(dim):
                groups = 1
            case Packed(dim, groups):
                pass
            case _:
                return True
        width, count, block = self.weight.shape[dim] // groups, self.scale.shape[dim] // groups, self.block[dim]
        if groups > 1 and size > 1 and (count % size or count * block != width):
            return False
        return all(
            chunk_bounds(width, size, rank)[0] == min(chunk_bounds(count, size, rank)[0] * block, width)
            for rank in range(size)
        )


def _get_block_shape(module: nn.Module, weight: str, kind: str, scale: torch.Tensor) -> tuple[int, ...] | None:
    if isinstance(module, PackedExperts):
        return (1,) * scale.ndim
    size: tuple[int, int] | None = getattr(module, "block_size", None)
    if kind != "scale_inv" or size is None:
        return None
    packed = module.get_parameter(weight).dtype == torch.int8
    return (1,) * (scale.ndim - 2) + tuple(_FP4_BLOCK if packed else size)


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
        plan: the plan; by default the one that `Plan.from_model` chooses for the mode, or none where the model has none
            and the mesh has no axis that a plan shards over.
        styles: the styles that the plan may name.

    Raises:
        UsageError: the mode does not fit the mesh, or the model is not a transformers model.
        UnknownStyleError: an entry names a style that neither the release nor the param-level dialect has.
        UnmatchedKeyError: an entry matches nothing, and is none of those that the model's classes declare.
        IndivisibleError: a mesh axis does not divide a packed parameter, the attention heads or the experts, or would
            cut a quantized weight within a block that has one scale.
        PlanError: the model has no plan or cannot be split into pipeline stages, an entry has no effect, entries of
            tied parameters contradict each other, FSDP would cut a packed parameter, a rank's slice of a fused layer
            would mix its matrices, or experts would be sharded across gate and up or only in part.
    """
    check_model(model)
    chosen = plan if isinstance(plan, Plan) else _choose_plan(model, mesh, mode, plan)
    check_mode(chosen.mode, mesh)
    view = PlanView(model, chosen.entries, styles.dialect(runtime_dialect()), styles)
    check_entries(view)
    stages = find_stages(model, mesh)
    scales = find_scales(model)
    quantized_keys = {find_key(chosen.entries, scale.weight, is_parameter=True) for scale in scales.values()}
    unquantized = {key: style for key, style in chosen.entries.items() if key not in quantized_keys}
    unmatched = check_unmatched_entries(model, unquantized)
    parameters = tuple(
        replace(parameter, stages=stages.get(parameter.name, ()))
        for parameter in _resolve_tensors(model, mesh, chosen, view.dialect, scales)
    )
    check_entry_effects(view, parameters, scales.keys())
    check_scale_blocks(mesh, parameters, scales)
    weights = tuple(parameter for parameter in parameters if parameter.name not in scales)
    check_fused_layers(view, mesh.tp)
    check_divisible(view, mesh, weights)
    check_stacked_experts(weights)
    check_packed_experts(model, parameters)
    return ResolvedPlan(
        str(model.config.model_type), chosen.mode, view.dialect.name, mesh, chosen.entries, parameters, unmatched
    )


def _choose_plan(model: PreTrainedModel, mesh: Mesh, mode: Mode, plan: Mapping[str, str] | None) -> Plan:
    needs_none = plan is None and mesh.tp == mesh.ep == 1 and not model.tp_plan
    return Plan(mode, {}) if needs_none else Plan.from_model(model, mode, plan)


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
            IndivisibleError: dim 0 holds packed groups, which FSDP would cut across.
        """
        if self.mesh.sizes(over)[0] == 1 or not self.tensors[name].ndim:
            return Replicate()
        if isinstance(inner, Packed) and inner.dim == 0:
            raise IndivisibleError(
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
