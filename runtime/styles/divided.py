"""Experts divided over ranks: how they are known, and the plans for them that would compute something else."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.distributed.tensor import DTensor

from plans.placement import Shard
from runtime.styles.placements import placement_of
from runtime.styles.style import Site, refuse

__all__ = ["DISPATCHING", "ROUTING", "check_divided", "check_masked_once", "divided_count", "is_divided"]

ROUTING = "ep_router"
DISPATCHING = "ep_dispatch_experts"
_SUMMING = frozenset({DISPATCHING, "moe_experts_allreduce", "moe_tp_experts"})


def is_divided(module: nn.Module) -> bool:
    """Say whether a module holds whole experts, this rank's only."""
    return divided_count(module) is not None


def divided_count(module: nn.Module) -> int | None:
    """Return the number of experts on all ranks, None where no stacked parameter is cut along its first dim."""
    for parameter in module._parameters.values():
        if isinstance(parameter, DTensor) and parameter.ndim > 2 and placement_of(parameter) == Shard(0):
            return parameter.shape[0]
    return None


def check_divided(site: Site) -> None:
    """Refuse experts that are not divided, or of which a rank holds some parameters for others than its own.

    Raises:
        PlanError: they are such.
    """
    count = divided_count(site.module)
    if count is None:
        raise refuse(
            site,
            f"whose experts are not divided: its output would be multiplied by {site.axis.size()}",
            hint="add grouped_gemm entries for its parameters",
        )
    for name, parameter in site.module._parameters.items():
        stacked = parameter is not None and parameter.ndim > 0 and parameter.shape[0] == count
        if stacked and placement_of(parameter) != Shard(0):
            raise refuse(
                site,
                f"whose {name} is {placement_of(parameter)} where the experts of its other parameters are divided",
                hint=f"add the entry {f'{site.name}.{name}'!r}: 'grouped_gemm'",
            )


def check_masked_once(sites: Sequence[Site]) -> None:
    """Refuse divided experts unless exactly one entry masks what is routed to other ranks, and one sums the outputs.

    Args:
        sites: every hooked module of a model, parameters sharded.

    Raises:
        PlanError: the numbers would be wrong, names the module and the entry to add or remove.
    """
    routed = {site.owner for site in sites if site.style == ROUTING}
    for site in (site for site in sites if is_divided(site.module)):
        if site.style not in _SUMMING:
            raise refuse(site, "whose divided experts' outputs it would not sum", hint=f"use {DISPATCHING}")
        if site.style == DISPATCHING and site.owner in routed:
            raise refuse(
                site, f"whose routing {ROUTING} masks already", hint=f"remove the {ROUTING} entry of its router"
            )
        if site.style != DISPATCHING and site.owner not in routed:
            raise refuse(
                site,
                "whose routing nothing masks: each rank would take other ranks' choices for its own",
                hint=f"add an {ROUTING} entry for its router, or use {DISPATCHING} for the experts",
            )
