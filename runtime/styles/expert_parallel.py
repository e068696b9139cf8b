"""Experts divided over ranks: how they are known, and the plans for them that would compute something else."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.distributed.tensor import DTensor

from plans.placement import Shard
from runtime.styles.placements import get_placement
from runtime.styles.style import HookSite, build_hook_error

__all__ = [
    "DISPATCH_STYLE",
    "ROUTER_STYLE",
    "check_routing_masks",
    "check_sharded_experts",
    "count_sharded_experts",
    "has_sharded_experts",
]

ROUTER_STYLE = "ep_router"
DISPATCH_STYLE = "ep_dispatch_experts"
_SUMMING_STYLES = frozenset({DISPATCH_STYLE, "moe_experts_allreduce", "moe_tp_experts"})


def has_sharded_experts(module: nn.Module) -> bool:
    """Say whether a module holds whole experts, this rank's only."""
    return count_sharded_experts(module) is not None


def count_sharded_experts(module: nn.Module) -> int | None:
    """Return the number of experts on all ranks, None where no stacked parameter is cut along its first dim."""
    for parameter in module._parameters.values():
        if isinstance(parameter, DTensor) and parameter.ndim > 2 and get_placement(parameter) == Shard(0):
            return parameter.shape[0]
    return None


def check_sharded_experts(site: HookSite) -> None:
    """Refuse experts that are not divided, or of which a rank holds some parameters for others than its own.

    Raises:
        PlanError: they are such.
    """
    count = count_sharded_experts(site.module)
    if count is None:
        raise build_hook_error(
            site,
            f"whose experts are not divided: its output would be multiplied by {site.axis.size()}",
            hint="add grouped_gemm entries for its parameters",
        )
    for name, parameter in site.module._parameters.items():
        stacked = parameter is not None and parameter.ndim > 0 and parameter.shape[0] == count
        if stacked and get_placement(parameter) != Shard(0):
            raise build_hook_error(
                site,
                f"whose {name} is {get_placement(parameter)} where the experts of its other parameters are divided",
                hint=f"add the entry {f'{site.name}.{name}'!r}: 'grouped_gemm'",
            )


def check_routing_masks(sites: Sequence[HookSite]) -> None:
    """Refuse divided experts unless exactly one entry masks what is routed to other ranks, and one sums the outputs.

    Args:
        sites: every hooked module of a model, parameters sharded.

    Raises:
        PlanError: the numbers would be wrong, names the module and the entry to add or remove.
    """
    routed = {site.parent for site in sites if site.style == ROUTER_STYLE}
    for site in (site for site in sites if has_sharded_experts(site.module)):
        if site.style not in _SUMMING_STYLES:
            raise build_hook_error(
                site, "whose divided experts' outputs it would not sum", hint=f"use {DISPATCH_STYLE}"
            )
        if site.style == DISPATCH_STYLE and site.parent in routed:
            raise build_hook_error(
                site,
                f"whose routing {ROUTER_STYLE} masks already",
                hint=f"remove the {ROUTER_STYLE} entry of its router",
            )
        if site.style != DISPATCH_STYLE and site.parent not in routed:
            raise build_hook_error(
                site,
                "whose routing nothing masks: each rank would take other ranks' choices for its own",
                hint=f"add an {ROUTER_STYLE} entry for its router, or use {DISPATCH_STYLE} for the experts",
            )
