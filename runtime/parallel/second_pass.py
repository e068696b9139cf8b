"""The second pass over a model: each module entry's style put around its module's forward."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from torch import nn
from torch.distributed.tensor import DTensor

from plans.errors import PlanError
from plans.expert_axis import find_expert_keys
from plans.plan import find_key
from plans.resolved import ResolvedPlan
from runtime.parallel.hooks import hook, record_hooks
from runtime.parallel.mesh import DeviceMeshes
from runtime.planning.plan import runtime_dialect
from runtime.styles.divided import check_routing_masks
from runtime.styles.registry import StyleRegistry
from runtime.styles.shared_inputs import SharedInputs
from runtime.styles.style import HookSite
from runtime.styles.sums import check_local_parameters, check_single_sum

__all__ = ["hook_modules"]


def hook_modules(model: nn.Module, resolved: ResolvedPlan, meshes: DeviceMeshes, styles: StyleRegistry) -> None:
    """Put each module entry's style around its module's forward, once for each module.

    Args:
        model: its parameters sharded.
        resolved: its plan.
        meshes: of the plan's sizes.
        styles: by name.

    Raises:
        PlanError: a style cannot hook the module of its entry, or no entry hooks a module with sharded parameters.
    """
    sites = list(_find_hook_sites(model, resolved, meshes))
    for site in sites:
        styles.style(site.style, site.name).check(site)
    check_routing_masks(sites)
    check_local_parameters(sites, styles.styles)
    check_single_sum(sites, styles.styles)
    for site in sites:
        around = styles.style(site.style, site.name).around
        if around is not None:
            hook(site, around)
    _share_inputs(sites)
    hooked = [site for site in sites if styles.style(site.style, site.name).around is not None]
    record_hooks(model, {site.name: site.style for site in hooked})
    _check_all_hooked(model, {site.module for site in hooked})


def _find_hook_sites(model: nn.Module, resolved: ResolvedPlan, meshes: DeviceMeshes) -> Iterator[HookSite]:
    over_experts = find_expert_keys(resolved.plan, resolved.mode, runtime_dialect())
    inputs: dict[nn.Module, SharedInputs] = defaultdict(SharedInputs)
    for name, module in model.named_modules():
        key = find_key(resolved.plan, name, is_parameter=False)
        if key is not None:
            axis = meshes.axis("ep" if key in over_experts else "tp")
            owner = model.get_submodule(name.rpartition(".")[0])
            config = getattr(model, "config", None)
            yield HookSite(name, module, axis, config, resolved.plan[key], owner, inputs[owner])


def _share_inputs(sites: Sequence[HookSite]) -> None:
    """Let modules side by side share inputs while the module that holds them runs."""
    beside = Counter(site.parent for site in sites)
    for owner, inputs in {site.parent: site.shared_inputs for site in sites}.items():
        if owner is not None and beside[owner] > 1:
            owner.forward = inputs.wrap_forward(owner.forward)


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
