"""Checks of what the hooked modules of one model ask of each other, run once their parameters are sharded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch.distributed.tensor import DTensor

from plans.errors import PlanError
from plans.plan import to_wildcard
from runtime.styles.placements import get_placement
from runtime.styles.routing import DISPATCH_STYLE, ROUTER_STYLE, has_sharded_experts
from runtime.styles.style import HookSite, ParallelStyle, build_hook_error, get_owner_kind, has_sharded_parameters

__all__ = ["check_hooks"]

_SUM_STYLE = "moe_experts_allreduce"
_SUMMING_STYLES = frozenset({DISPATCH_STYLE, _SUM_STYLE, "moe_tp_experts"})


@dataclass(frozen=True)
class _HookedModule:
    """A hooked module and its style."""

    site: HookSite
    style: ParallelStyle

    def is_below(self, other: _HookedModule) -> bool:
        return self.site.name.startswith(f"{other.site.name}.")


def check_hooks(sites: Sequence[HookSite], styles: Mapping[str, ParallelStyle]) -> None:
    """Check that the hooks of a model route, shard and sum exactly once.

    Args:
        sites: every module of the model with an entry, parameters sharded.
        styles: the styles by name.

    Raises:
        PlanError: they do not; names the module and the entry to add or remove.
    """
    hooked = [_HookedModule(site, styles[site.style]) for site in sites if styles[site.style].around is not None]
    _check_routing_masks(sites)
    _check_local_parameters(hooked)
    _check_single_sum(hooked)


def _check_routing_masks(sites: Sequence[HookSite]) -> None:
    """Check that exactly one entry masks what is routed to other ranks' experts, and that one sums the outputs."""
    routed = {site.parent for site in sites if site.style == ROUTER_STYLE}
    for site in (site for site in sites if has_sharded_experts(site.module)):
        if site.style not in _SUMMING_STYLES:
            style = _SUM_STYLE if site.parent in routed else DISPATCH_STYLE
            raise build_hook_error(
                site,
                "which holds the experts of this rank only: nothing would sum their outputs",
                hint=f"use {style!r} for {to_wildcard(site.name)!r}",
            )
        if site.style == DISPATCH_STYLE and site.parent in routed:
            raise build_hook_error(
                site,
                f"whose routing {ROUTER_STYLE} already masks",
                hint=f"use {_SUM_STYLE!r} for {to_wildcard(site.name)!r}, or remove the entry of its router",
            )
        if site.style != DISPATCH_STYLE and site.parent not in routed:
            raise build_hook_error(
                site,
                "whose routing nothing masks: each rank would take other ranks' choices for its own",
                hint=f"use {DISPATCH_STYLE!r} for {to_wildcard(site.name)!r}",
            )


def _check_local_parameters(hooked: Sequence[_HookedModule]) -> None:
    """Check that a style can compute with the sharded parameters that its module itself owns."""
    for module in hooked:
        for name, parameter in module.site.module._parameters.items():
            if isinstance(parameter, DTensor) and not _is_accepted(module, parameter, hooked):
                raise _build_local_parameter_error(module.site, name, parameter)


def _is_accepted(module: _HookedModule, parameter: DTensor, hooked: Sequence[_HookedModule]) -> bool:
    owner, placement = get_owner_kind(module.site.module), get_placement(parameter)
    fitting = [own for own in module.style.own if own.accepts(owner, placement, parameter.ndim)]
    return any(not own.below_sum or _is_summed_above(module, hooked) for own in fitting)


def _is_summed_above(module: _HookedModule, hooked: Sequence[_HookedModule]) -> bool:
    """Return whether all parameters of a module are sharded and an entry above it sums what they compute."""
    parameters = module.site.module.parameters(recurse=False)
    all_sharded = all(isinstance(parameter, DTensor) for parameter in parameters)
    return all_sharded and any(above.style.sums == "its parts" and module.is_below(above) for above in hooked)


def _build_local_parameter_error(site: HookSite, name: str, parameter: DTensor) -> PlanError:
    if parameter.ndim > 2:
        reason = f"whose {name} is sharded: its output would be partial, and nothing would sum it"
        hint = f"use {_SUM_STYLE!r} for {to_wildcard(site.name)!r}"
    else:
        kind = type(site.module).__name__
        reason = f"whose own {name} is {get_placement(parameter)}: it would use a shard as if it were the whole {kind}"
        hint = f"remove the entry {to_wildcard(f'{site.name}.{name}')!r}"
        if get_owner_kind(site.module) != "module":
            hint = f"give {to_wildcard(site.name)!r} and its weight one style, or {hint}"
    return build_hook_error(site, reason, hint)


def _check_single_sum(hooked: Sequence[_HookedModule]) -> None:
    """Check that no entry sums over the ranks what is whole below it already."""
    for summing in (module for module in hooked if module.style.sums == "its parts"):
        for module in hooked:
            is_summed = module.style.sums != "nothing"
            is_whole = module.style.gives in ("whole", "sequence") and has_sharded_parameters(
                module.site.module, recurse=False
            )
            if module.is_below(summing) and (is_summed or is_whole):
                does = "sums its own output" if is_summed else "returns a whole output"
                size, name = summing.site.axis.size(), summing.site.name
                raise build_hook_error(
                    summing.site,
                    f"whose {module.site.name} {does}: it would count {size} times",
                    hint=f"remove the entry of {name}, or those of the modules below it",
                )
