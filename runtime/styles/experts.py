"""Styles of routed experts: each rank holds a slice of every expert, or under expert parallelism whole experts.

Sharding and communication are separate entries: `moe_tp_*` or `grouped_gemm` on the parameters, an all-reduce on the
module. The experts' hook itself never shards.
"""

from __future__ import annotations

import torch
from torch import nn

from plans.placement import Replicate
from runtime.styles.arguments import by_place, called, with_summed_gradients
from runtime.styles.collectives import all_reduce
from runtime.styles.divided import check_divided, is_divided
from runtime.styles.facts import Own
from runtime.styles.placements import placement_of
from runtime.styles.routing import routing_of, run_experts
from runtime.styles.style import ParallelStyle, Run, Site, has_sharded, refuse

__all__ = ["EXPERT_STYLES"]


def experts_all_reduce(site: Site, run: Run, *args: object, **kwargs: object) -> object:
    """Sum the experts' partial outputs; hidden states and routing weights, used in part, get gradients summed.

    Under expert parallelism the router's hook has masked the routing weights and sums their gradients.
    """
    kept = routing_of(args, kwargs).weights if is_divided(site.module) else None
    values = with_summed_gradients(by_place(args, kwargs), site.axis, kept)
    return all_reduce(run_experts(site, run, *called(values, len(args))), site.axis)


def identity_expert(site: Site, run: Run, inputs: torch.Tensor, *args: object, **kwargs: object) -> object:
    """Divide an input that every rank passes on whole, so that the experts' sum counts it once."""
    return run(inputs / site.axis.size(), *args, **kwargs)


def _check_sharded(site: Site) -> None:
    if is_divided(site.module):
        check_divided(site)
        return
    if not has_sharded(site.module, recurse=True):
        raise refuse(
            site,
            f"whose parameters are whole: its output would be multiplied by {site.axis.size()}",
            hint="add moe_tp_gate_up_colwise and moe_tp_down_rowwise entries for its parameters",
        )
    for name, parameter in site.module._parameters.items():
        if name.endswith("bias") and placement_of(parameter) == Replicate():
            raise refuse(
                site,
                f"whose whole {name} would be added {site.axis.size()} times",
                hint="these experts cannot be tensor parallel; use expert parallelism",
            )


def _check_identity(site: Site) -> None:
    if not isinstance(site.module, nn.Identity):
        raise refuse(site, "which is no nn.Identity", hint="remove the entry: dividing its input changes its output")


EXPERT_STYLES = (
    ParallelStyle("moe_tp_gate_up_colwise"),
    ParallelStyle("moe_tp_down_rowwise"),
    *(
        ParallelStyle(
            name,
            experts_all_reduce,
            _check_sharded,
            takes="whole",
            gives="whole",
            sums="its parts",
            own=(Own("module"),),
        )
        for name in ("moe_experts_allreduce", "moe_tp_experts")
    ),
    ParallelStyle("moe_identity_expert", identity_expert, _check_identity, takes="whole", gives="partial"),
)
