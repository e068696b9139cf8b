"""Styles of routed experts: each rank holds a slice of every expert, or under expert parallelism whole experts.

Sharding and communication are separate entries: `moe_tp_*` or `grouped_gemm` on the parameters, an all-reduce on the
module. The experts' hook itself never shards.
"""

from __future__ import annotations

import torch
from torch import nn

from plans.placement import Replicate
from plans.plan import to_wildcard
from runtime.models.expert_layout import read_expert_layout
from runtime.styles.call import index_arguments, split_arguments, sum_argument_gradients
from runtime.styles.collectives import all_reduce
from runtime.styles.placements import get_placement
from runtime.styles.routing import check_sharded_experts, find_routing, has_sharded_experts, run_experts
from runtime.styles.style import (
    Forward,
    HookSite,
    LocalParameters,
    ParallelStyle,
    build_hook_error,
    has_sharded_parameters,
)

__all__ = ["EXPERT_STYLES"]


def all_reduce_experts(site: HookSite, run: Forward, *args: object, **kwargs: object) -> object:
    """Sum the experts' partial outputs; the gradients of hidden states and routing weights are summed too.

    Under expert parallelism the router's hook has masked the routing weights, and sums their gradients itself.
    """
    excluded = find_routing(args, kwargs).weights if has_sharded_experts(site.module) else None
    values = sum_argument_gradients(index_arguments(args, kwargs), site.axis, excluded)
    return all_reduce(run_experts(site, run, *split_arguments(values, len(args))), site.axis)


def scale_identity_input(site: HookSite, run: Forward, inputs: torch.Tensor, *args: object, **kwargs: object) -> object:
    """Divide an input that every rank returns whole, so that the sum over the experts' ranks counts it once."""
    return run(inputs / site.axis.size(), *args, **kwargs)


def _check_expert_shards(site: HookSite) -> None:
    if has_sharded_experts(site.module):
        check_sharded_experts(site)
        return
    if not has_sharded_parameters(site.module, recurse=True):
        raise build_hook_error(
            site,
            f"whose parameters are whole: its output would be multiplied by {site.axis.size()}",
            hint=_suggest_shards(site),
        )
    for name, parameter in site.module._parameters.items():
        if name.endswith("bias") and get_placement(parameter) == Replicate():
            raise build_hook_error(
                site,
                f"whose whole {name} would be added {site.axis.size()} times",
                hint="these experts cannot be tensor parallel; choose expert parallelism, `mode=ep`",
            )


def _suggest_shards(site: HookSite) -> str:
    """Return the hint for whole experts: the entries of their parameters, if their layout is the one these fit."""
    layout, key = read_expert_layout(site.name, site.module), to_wildcard(site.name)
    if layout is None or layout.irregularity is not None:
        return f"remove the entry {key!r}, or choose expert parallelism, `mode=ep`"
    gate_up, down = f"{key}.gate_up_proj", f"{key}.down_proj"
    return f"add the entries {gate_up!r}: 'moe_tp_gate_up_colwise', {down!r}: 'moe_tp_down_rowwise'"


def _check_identity(site: HookSite) -> None:
    if not isinstance(site.module, nn.Identity):
        raise build_hook_error(
            site, "which is not an nn.Identity", hint="remove the entry: dividing its input would change its output"
        )


EXPERT_STYLES = (
    ParallelStyle("moe_tp_gate_up_colwise"),
    ParallelStyle("moe_tp_down_rowwise"),
    *(
        ParallelStyle(
            name,
            all_reduce_experts,
            _check_expert_shards,
            takes="whole",
            gives="whole",
            sums="its parts",
            own=(LocalParameters("module"),),
        )
        for name in ("moe_experts_allreduce", "moe_tp_experts")
    ),
    ParallelStyle("moe_identity_expert", scale_identity_input, _check_identity, takes="whole", gives="partial"),
)
