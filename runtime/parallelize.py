"""A resolved plan applied to a model: parameters first, then forwards, so that hooks see sharded parameters."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from plans.errors import PlanError, UsageError
from plans.placement import Placement, Replicate
from plans.plan import lookup
from plans.resolved import ResolvedParameter, ResolvedPlan
from runtime.mesh import DeviceMeshes, inner_axis
from runtime.styles.registry import STYLES, StyleRegistry
from runtime.styles.style import Around, Site, local_parameters

__all__ = ["inner_placement", "parallelize"]


def parallelize(model: nn.Module, resolved: ResolvedPlan, meshes: DeviceMeshes, styles: StyleRegistry = STYLES) -> None:
    """Make a model parallel, in place.

    Parameters that the plan shards become DTensors on its innermost mesh axis; on meta they stay placeholders
    without memory. All others stay plain tensors, whole on every rank.

    Args:
        model: on meta or materialized with the same weights on every rank.
        resolved: the plan, resolved on this model.
        meshes: of the same sizes as the plan's mesh.
        styles: those that the plan may name.

    Raises:
        UnknownStyleError: a plan entry names a style that cannot run here.
        UsageError: the model is parallel already, or the meshes are not the plan's.
        PlanError: the plan was resolved on another model, or a style cannot hook the module its entry names. The
            model is of no use then.
    """
    for key, style in resolved.plan.items():
        styles.style(style, key)
    axis = _axis(resolved, meshes)
    _check_untouched(model, resolved)
    _shard_parameters(model, resolved, axis, styles)
    hooked = _hook_modules(model, resolved, axis, styles)
    _check_all_hooked(model, hooked)


def inner_placement(parameter: ResolvedParameter) -> Placement:
    """Return a parameter's placement on the axis that plan entries shard over."""
    *outer, inner = parameter.placements
    assert all(placement == Replicate() for placement in outer), "FSDP axes are refused before this"
    return inner


def _axis(resolved: ResolvedPlan, meshes: DeviceMeshes) -> DeviceMesh:
    mesh = meshes["dense"]
    if tuple(mesh.shape) != resolved.mesh.sizes("dense") or mesh.mesh_dim_names != resolved.mesh.axes("dense"):
        raise UsageError(
            f"the plan is for {resolved.mesh.sizes('dense')} ranks on the axes {resolved.mesh.axes('dense')}, "
            f"the device mesh has {tuple(mesh.shape)} on {mesh.mesh_dim_names}",
            hint="resolve the plan for this mesh, or build the mesh with device_meshes(resolved.mesh, ...)",
        )
    return inner_axis(meshes, "dense")


def _check_untouched(model: nn.Module, resolved: ResolvedPlan) -> None:
    shapes = {name: tuple(value.shape) for name, value in model.named_parameters(remove_duplicate=False)}
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise UsageError(
            f"this {type(model).__name__} is parallel already", hint="build the model anew and parallelize it once"
        )
    planned = {row.name: row.shape for row in resolved.parameters if row.kind != "buffer"}
    if planned != shapes:
        name = sorted(dict(planned.items() ^ shapes.items()))[0]
        raise PlanError(
            f"the plan was resolved on another model: {name} is {shapes.get(name, 'missing')} here and "
            f"{planned.get(name, 'missing')} in the plan",
            hint="resolve the plan on this model",
            parameter=name,
        )


def _shard_parameters(model: nn.Module, resolved: ResolvedPlan, axis: DeviceMesh, styles: StyleRegistry) -> None:
    for row in resolved.parameters:
        if row.kind == "parameter" and inner_placement(row) != Replicate():
            assert row.style is not None
            assert row.key is not None
            owner, _, name = row.name.rpartition(".")
            site = Site(owner, model.get_submodule(owner), axis, getattr(model, "config", None), row.style)
            styles.style(row.style, row.key).shard(site, name, inner_placement(row))
    for row in resolved.parameters:
        if row.tied_to is not None:
            owner, _, name = row.name.rpartition(".")
            model.get_submodule(owner)._parameters[name] = model.get_parameter(row.tied_to)


def _hook_modules(model: nn.Module, resolved: ResolvedPlan, axis: DeviceMesh, styles: StyleRegistry) -> set[nn.Module]:
    """Put each module entry's style around its module's forward, once for each module."""
    sites = list(_sites(model, resolved, axis))
    for site in sites:
        styles.style(site.style, site.name).check(site)
    for site in sites:
        around = styles.style(site.style, site.name).around
        if around is not None:
            site.module.forward = _wrapped(site, around, site.module.forward)
    return {site.module for site in sites if styles.style(site.style, site.name).around is not None}


def _sites(model: nn.Module, resolved: ResolvedPlan, axis: DeviceMesh) -> Iterator[Site]:
    for name, module in model.named_modules():
        key = lookup(resolved.plan, name, is_parameter=False)
        if key is not None:
            yield Site(name, module, axis, getattr(model, "config", None), resolved.plan[key])


def _wrapped(site: Site, around: Around, forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: object, **kwargs: object) -> object:
        with local_parameters(site.module):
            return forward(*args, **kwargs)

    @functools.wraps(forward)
    def parallel_forward(*args: object, **kwargs: object) -> object:
        return around(site, run, *args, **kwargs)

    return parallel_forward


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
