"""A plan applied to a model: parameters first, then forwards, so that hooks see sharded parameters."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from plans.errors import PlanError, UsageError
from plans.expert_axis import expert_keys
from plans.mesh import Mesh, Mode
from plans.placement import Placement, Replicate
from plans.plan import lookup
from plans.resolved import ResolvedParameter, ResolvedPlan
from runtime.agreement import together
from runtime.fsdp import shard_over_data
from runtime.head_norms import check_head_norms
from runtime.hooks import hook, is_parallel, remember_hooks
from runtime.mesh import DeviceMeshes, as_device_meshes
from runtime.partners import check_partners
from runtime.plan import Plan, runtime_dialect
from runtime.resolve import resolve
from runtime.same_on_ranks import check_same_model
from runtime.sequence_checks import check_sequence_plan, take_embeddings
from runtime.styles.divided import check_masked_once
from runtime.styles.registry import STYLES, StyleRegistry
from runtime.styles.shared_inputs import SummedInputs
from runtime.styles.style import Site
from runtime.styles.sums import check_summed_once

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["inner_placement", "parallelize"]


def parallelize(
    model: PreTrainedModel,
    mesh: DeviceMeshes | DeviceMesh | Mesh,
    plan: ResolvedPlan | Plan | Mapping[str, str] | None = None,
    styles: StyleRegistry = STYLES,
) -> ResolvedPlan:
    """Make a model parallel, in place, and return the plan as it was resolved on it.

    In two passes: first parameters, which become DTensors on their mesh axis (on meta they stay placeholders without
    memory) where the plan shards them and stay plain tensors, whole on every rank, where not; then modules, whose
    forwards are hooked. Tied weights are sharded once and stay tied.

    Args:
        model: on meta, or materialized with the same weights on every rank.
        mesh: a device mesh with the axes `tp`, `ep` or `fsdp` and `tp`, the sizes of one, or device meshes.
        plan: resolved on this model, chosen, or key to style; by default what `Plan.from_model` chooses for `tp`, or
            for `tp_ep` where the mesh has an expert axis.
        styles: those that the plan may name.

    Raises:
        UnknownStyleError: a plan entry names a style that cannot run here.
        UsageError: the model is parallel already, the mesh is not the plan's or lacks its axis, or ranks hold other
            weights or were given other plans.
        PlanError: the plan was resolved on another model, cuts a layer without those that go with it, forgets a norm
            on heads or an end of the sequence parallel stream, or names a style that cannot hook the module of its
            entry. The model is of no use then.
    """
    if isinstance(plan, str):
        raise UsageError(
            f"{plan!r} is not a plan", hint=f"pass Plan.from_model(model, {plan!r}), or key to style", plan=plan
        )
    meshes = as_device_meshes(mesh)
    resolved = together(lambda: _resolved(model, meshes, plan, styles), meshes.all_ranks)
    check_same_model(model, resolved, meshes.all_ranks)
    _shard_parameters(model, resolved, meshes, styles)
    hooked = _hook_modules(model, resolved, meshes, styles)
    _check_all_hooked(model, hooked)
    take_embeddings(model, resolved, meshes)
    shard_over_data(model, resolved, meshes)
    return resolved


def _resolved(
    model: PreTrainedModel,
    meshes: DeviceMeshes,
    plan: ResolvedPlan | Plan | Mapping[str, str] | None,
    styles: StyleRegistry,
) -> ResolvedPlan:
    """Return the plan as it is on this model and mesh, everything checked that can be before the model is changed."""
    _check_plain(model)
    resolved = plan if isinstance(plan, ResolvedPlan) else resolve(model, meshes.sizes, _mode(meshes.sizes), plan)
    for key, style in resolved.plan.items():
        styles.style(style, key)
    if resolved.mesh != meshes.sizes:
        raise UsageError(
            f"the plan is for {resolved.mesh}, the device mesh is {meshes.sizes}",
            hint="resolve the plan for this mesh, or build the mesh with device_meshes(resolved.mesh, ...)",
        )
    _check_resolved_on(model, resolved)
    if resolved.mesh.tp > 1:
        check_partners(model, resolved.plan, runtime_dialect())
        check_head_norms(model, resolved.plan, runtime_dialect())
    check_sequence_plan(model, resolved)
    return resolved


def inner_placement(parameter: ResolvedParameter) -> Placement:
    """Return a parameter's placement on the axis that plan entries shard over."""
    return parameter.placements[-1]


def _mode(sizes: Mesh) -> Mode:
    """Return the mode that a mesh most likely means."""
    if sizes.ep == 1:
        return "tp"
    return "tp_ep" if sizes.ep > sizes.tp or sizes.fsdp > 1 else "ep"


def _axis_of(row: ResolvedParameter) -> str:
    return "ep" if row.mesh == "experts" else "tp"


def _check_plain(model: nn.Module) -> None:
    if is_parallel(model):
        raise UsageError(
            f"this {type(model).__name__} is parallel already", hint="build the model anew and parallelize it once"
        )


def _check_resolved_on(model: nn.Module, resolved: ResolvedPlan) -> None:
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
    for row in resolved.parameters:
        if row.kind == "parameter" and inner_placement(row) != Replicate():
            assert row.style is not None
            assert row.key is not None
            owner, _, name = row.name.rpartition(".")
            axis = meshes.axis(_axis_of(row))
            site = Site(owner, model.get_submodule(owner), axis, getattr(model, "config", None), row.style)
            styles.style(row.style, row.key).shard(site, name, inner_placement(row))
    for row in resolved.parameters:
        if row.tied_to is not None:
            owner, _, name = row.name.rpartition(".")
            model.get_submodule(owner)._parameters[name] = model.get_parameter(row.tied_to)


def _hook_modules(
    model: nn.Module, resolved: ResolvedPlan, meshes: DeviceMeshes, styles: StyleRegistry
) -> set[nn.Module]:
    """Put each module entry's style around its module's forward, once for each module."""
    sites = list(_sites(model, resolved, meshes))
    for site in sites:
        styles.style(site.style, site.name).check(site)
    check_masked_once(sites)
    check_summed_once(sites)
    for site in sites:
        around = styles.style(site.style, site.name).around
        if around is not None:
            hook(site, around)
    _share_inputs(sites)
    hooked = [site for site in sites if styles.style(site.style, site.name).around is not None]
    remember_hooks(model, {site.name: site.style for site in hooked})
    return {site.module for site in hooked}


def _sites(model: nn.Module, resolved: ResolvedPlan, meshes: DeviceMeshes) -> Iterator[Site]:
    over_experts = expert_keys(resolved.plan, resolved.mode, runtime_dialect())
    inputs: dict[nn.Module, SummedInputs] = defaultdict(SummedInputs)
    for name, module in model.named_modules():
        key = lookup(resolved.plan, name, is_parameter=False)
        if key is not None:
            axis = meshes.axis("ep" if key in over_experts else "tp")
            owner = model.get_submodule(name.rpartition(".")[0])
            config = getattr(model, "config", None)
            yield Site(name, module, axis, config, resolved.plan[key], owner, inputs[owner])


def _share_inputs(sites: Sequence[Site]) -> None:
    """Let modules side by side share inputs while the module that holds them runs."""
    beside = Counter(site.owner for site in sites)
    for owner, inputs in {site.owner: site.inputs for site in sites}.items():
        if owner is not None and beside[owner] > 1:
            owner.forward = inputs.during(owner.forward)


def _check_all_hooked(model: nn.Module, hooked: set[nn.Module]) -> None:
    """Refuse sharded parameters whose module nothing hooks: its forward would compute on pieces as if whole."""
    for name, module in model.named_modules():
        sharded = [key for key, value in module._parameters.items() if isinstance(value, DTensor)]
        if sharded and module not in hooked:
            raise PlanError(
                f"{name}.{sharded[0]} is sharded, but no plan entry hooks {name}, whose forward would use a piece "
                "as if it were whole",
                hint="add an entry for the module that owns it, such as moe_experts_allreduce or local_params",
                parameter=f"{name}.{sharded[0]}",
            )
