"""A plan applied to a model: parameters first, then forwards, so that hooks see sharded parameters."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from plans.dialect import Dialect
from plans.errors import PlanError, UsageError
from plans.mesh import Mesh, Mode
from plans.placement import Placement, Replicate
from plans.plan import find_expert_keys, to_wildcard
from plans.resolved_plan import ResolvedParameter, ResolvedPlan
from runtime.checks.plan import check_before_sharding
from runtime.checks.plan_view import PlanView
from runtime.parallel.embedding_reads import let_others_read_embeddings
from runtime.parallel.fsdp import apply_fsdp, check_shards_for_fsdp
from runtime.parallel.hooks import hook_input_embeddings, hook_modules, is_parallel
from runtime.parallel.mesh import DeviceMeshes, as_device_meshes
from runtime.parallel.pipeline import keep_stage, run_stages
from runtime.parallel.rank_consistency import check_same_model
from runtime.planning.plan import Plan, runtime_dialect
from runtime.planning.resolve import resolve
from runtime.processes.agreement import raise_on_any_rank
from runtime.styles.registry import STYLES, StyleRegistry
from runtime.styles.style import HookSite

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["apply_plan", "parallelize"]


def parallelize(
    model: PreTrainedModel,
    mesh: DeviceMeshes | DeviceMesh | Mesh,
    plan: ResolvedPlan | Plan | Mapping[str, str] | None = None,
    styles: StyleRegistry = STYLES,
) -> ResolvedPlan:
    """Make a model parallel, in place, and return the plan as it was resolved on it.

    In two passes: first parameters, which become DTensors on their mesh axis (on meta they stay placeholders without
    memory) where the plan shards them and stay plain tensors, whole on every rank, where not; then modules, whose
    forwards are hooked. Tied weights are sharded once and stay tied. On a mesh with pipeline stages, each rank keeps
    the layers of its own stage; such a model computes logits and generates, but has no backward.

    Args:
        model: on meta, or materialized with the same weights on every rank.
        mesh: a device mesh with the axes `tp`, `ep` or `fsdp` and `tp`, the sizes of one, or device meshes.
        plan: resolved on this model, chosen, or key to style; by default what `Plan.from_model` chooses for `tp`, or
            for `tp_ep` where the mesh has an expert axis. Key to style is taken for `ep` where the mesh is one axis
            `ep`, or where all entries speak of divided experts and the mesh has as many `ep` as `tp` ranks.
        styles: the styles that the plan may name.

    Raises:
        UnknownStyleError: a plan entry names a style that cannot run here.
        UsageError: the model is parallel already, the mesh is not the plan's or lacks its axis, or ranks hold other
            weights or were given other plans.
        PlanError: the plan was resolved on another model, cuts a layer without those that go with it, forgets a norm
            on heads or an end of the sequence parallel stream, names a style that cannot hook the module of its
            entry, or leaves a rank nothing of what FSDP shards. The model is of no use then.
    """
    meshes = as_device_meshes(mesh)
    resolved = apply_plan(model, meshes, plan, styles)
    apply_fsdp(model, resolved, meshes)
    run_stages(model)
    return resolved


def apply_plan(
    model: PreTrainedModel,
    meshes: DeviceMeshes,
    plan: ResolvedPlan | Plan | Mapping[str, str] | None,
    styles: StyleRegistry = STYLES,
) -> ResolvedPlan:
    """Apply a plan to a model as `parallelize` does, and leave data parallelism out."""
    if isinstance(plan, str):
        raise UsageError(
            f"{plan!r} is not a plan", hint=f"pass Plan.from_model(model, {plan!r}), or key to style", plan=plan
        )
    resolved = raise_on_any_rank(lambda: _resolve_checked(model, meshes, plan, styles), meshes.spanning_axes)
    check_same_model(model, resolved, meshes.spanning_axes)
    if not isinstance(plan, Mapping):
        _warn_about_unsharded_layers(model, resolved)
    keep_stage(model, resolved, meshes)
    _shard_parameters(model, resolved, meshes, styles)
    hook_modules(model, resolved, meshes, styles)
    hook_input_embeddings(model, resolved, meshes, styles)
    if resolved.mode not in ("sp", "sp_ep"):  # where a gradient would be that of the rank's slice of the sequence
        let_others_read_embeddings(model)
    return resolved


def _resolve_checked(
    model: PreTrainedModel,
    meshes: DeviceMeshes,
    plan: ResolvedPlan | Plan | Mapping[str, str] | None,
    styles: StyleRegistry,
) -> ResolvedPlan:
    """Return the plan as it is on this model and mesh, everything checked that can be before the model is changed."""
    _check_not_parallel(model)
    dialect = styles.dialect(runtime_dialect())
    if isinstance(plan, ResolvedPlan):
        resolved = plan
    else:
        resolved = resolve(model, meshes.sizes, _infer_mode(meshes, plan, dialect), plan, styles)
    if resolved.mesh != meshes.sizes:
        raise UsageError(
            f"the plan is for {resolved.mesh}, the device mesh is {meshes.sizes}",
            hint="resolve the plan for this mesh, or build the mesh with device_meshes(resolved.mesh, ...)",
            planned=resolved.mesh.to_json(),
            found=meshes.sizes.to_json(),
        )
    _check_plan_fits_model(model, resolved)
    check_before_sharding(PlanView(model, resolved.plan, dialect, styles), resolved.mesh)
    check_shards_for_fsdp(resolved)
    return resolved


def _get_inner_placement(parameter: ResolvedParameter) -> Placement:
    """Return a parameter's placement on the axis that plan entries shard over."""
    return parameter.placements[-1]


def _infer_mode(meshes: DeviceMeshes, plan: Plan | Mapping[str, str] | None, dialect: Dialect) -> Mode:
    """Return the mode that a mesh, and a plan that is only key to style, mean."""
    sizes = meshes.sizes
    if sizes.ep == 1:
        return "tp"
    if "tp" not in meshes.axes:
        return "ep"
    given = plan if isinstance(plan, Mapping) else {}
    only_experts = bool(given) and find_expert_keys(given, "tp_ep", dialect) == given.keys()
    return "ep" if only_experts and sizes.tp == sizes.ep and sizes.fsdp == 1 else "tp_ep"


def _warn_about_unsharded_layers(model: nn.Module, resolved: ResolvedPlan) -> None:
    """Say so where the plan that a model's classes write down cuts none of its layers."""
    cut = [
        row.name for row in resolved.parameters if _get_inner_placement(row) != Replicate() and row.kind == "parameter"
    ]
    if resolved.mesh.tp > 1 and resolved.plan and all(name == to_wildcard(name) for name in cut):
        warnings.warn(
            f"{type(model).__name__}: the plan cuts {', '.join(cut) or 'nothing'} only, every rank holds and computes "
            "all layers whole; pass a plan of your own",
            stacklevel=4,
        )


def _get_axis_name(row: ResolvedParameter) -> str:
    return "ep" if row.mesh == "experts" else "tp"


def _check_not_parallel(model: nn.Module) -> None:
    if is_parallel(model):
        raise UsageError(
            f"this {type(model).__name__} is parallel already",
            hint="build the model anew and parallelize it once",
            model=type(model).__name__,
        )


def _check_plan_fits_model(model: nn.Module, resolved: ResolvedPlan) -> None:
    shapes = {name: tuple(value.shape) for name, value in model.named_parameters(remove_duplicate=False)}
    planned = {row.name: row.shape for row in resolved.parameters if row.kind != "buffer"}
    if planned != shapes:
        name = sorted(dict(planned.items() ^ shapes.items()))[0]
        raise PlanError(
            f"the plan was resolved on another model: {name} is {shapes.get(name, 'missing')} here and "
            f"{planned.get(name, 'missing')} in the plan",
            hint="resolve the plan on this model",
            parameter=name,
        )


def _shard_parameters(model: nn.Module, resolved: ResolvedPlan, meshes: DeviceMeshes, styles: StyleRegistry) -> None:
    rank = dist.get_rank()
    held = [row for row in resolved.parameters if resolved.mesh.holds(rank, row.stages)]
    for row in held:
        if row.kind == "parameter" and _get_inner_placement(row) != Replicate():
            assert row.style is not None
            assert row.key is not None
            owner, _, name = row.name.rpartition(".")
            axis = meshes.axis(_get_axis_name(row))
            site = HookSite(owner, model.get_submodule(owner), axis, getattr(model, "config", None), row.style)
            styles.style(row.style, row.key).shard(site, name, _get_inner_placement(row))
    for row in held:
        if row.tied_to is not None:
            owner, _, name = row.name.rpartition(".")
            model.get_submodule(owner)._parameters[name] = model.get_parameter(row.tied_to)
