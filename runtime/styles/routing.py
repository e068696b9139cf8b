"""Expert parallelism: each rank holds some experts, and takes from a router's choices those of its own experts.

Every rank of the expert axis sees the same tokens. A choice that lives on another rank gets the weight 0 and the number
one past the last local expert, which experts forwards skip.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from plans.errors import PlanError
from plans.placement import Placement, Shard
from plans.plan import to_wildcard
from runtime.styles.call import ArgumentKey, index_arguments, split_arguments, sum_argument_gradients
from runtime.styles.collectives import add_dependency, all_reduce, all_reduce_gradient
from runtime.styles.placements import get_placement, local_tensor
from runtime.styles.style import (
    Forward,
    HookSite,
    LocalParameters,
    ParallelStyle,
    build_hook_error,
    shard_parameter,
    suggest_removal,
)

__all__ = [
    "DISPATCH_STYLE",
    "ROUTER_STYLE",
    "ROUTING_STYLES",
    "Routing",
    "check_sharded_experts",
    "find_routing",
    "has_sharded_experts",
    "run_experts",
]

ROUTER_STYLE = "ep_router"
DISPATCH_STYLE = "ep_dispatch_experts"


@dataclass(frozen=True)
class Routing:
    """Where a call's arguments, or a router's outputs, hold the routing.

    Args:
        index: the key of the chosen experts, `[tokens, top_k]` integers.
        weights: the key of their weights, of the same shape.
    """

    index: ArgumentKey
    weights: ArgumentKey


def has_sharded_experts(module: nn.Module) -> bool:
    """Return whether a module's stacked experts are divided over the ranks, each expert whole on one rank."""
    return _count_experts(module) is not None


def _count_experts(module: nn.Module) -> int | None:
    """Return the number of experts on all ranks, None if no stacked parameter is sharded along its first dim."""
    for parameter in module._parameters.values():
        if isinstance(parameter, DTensor) and parameter.ndim > 2 and get_placement(parameter) == Shard(0):
            return parameter.shape[0]
    return None


def check_sharded_experts(site: HookSite) -> None:
    """Check that a module's experts are divided over the ranks, in all of its parameters.

    Raises:
        PlanError: its experts are not divided over the ranks.
    """
    count = _count_experts(site.module)
    if count is None:
        raise build_hook_error(
            site,
            f"whose experts are not divided over the ranks: its output would be multiplied by {site.axis.size()}",
            hint=_suggest_entries(site, site.module._parameters),
        )
    for name, parameter in site.module._parameters.items():
        is_stacked = parameter is not None and parameter.ndim > 0 and parameter.shape[0] == count
        if is_stacked and get_placement(parameter) != Shard(0):
            raise build_hook_error(
                site,
                f"whose {name} is {get_placement(parameter)}, while its other parameters are sharded by expert",
                hint=_suggest_entries(site, [name]),
            )


def _suggest_entries(site: HookSite, names: Iterable[str]) -> str:
    entries = ", ".join(f"{to_wildcard(f'{site.name}.{name}')!r}: 'grouped_gemm'" for name in names)
    return f"add {'the entries' if ', ' in entries else 'the entry'} {entries}"


def shard_experts(site: HookSite, name: str, placement: Placement) -> None:
    """Shard a stacked parameter by expert, and let the module count only its own experts."""
    shard_parameter(site, name, placement)
    parameter = site.parameter(name)
    assert isinstance(parameter, DTensor)
    site.module.__dict__["num_experts"] = parameter.to_local().shape[0]
    # Experts forwards of transformers 5.18 and later skip the choices of other ranks only if this is set.
    site.module.__dict__["_is_expert_parallel"] = True


def dispatch_experts(site: HookSite, run: Forward, *args: object, **kwargs: object) -> object:
    """Mask and renumber the routing inside the experts' hook, run the local experts, sum over the ranks."""
    values = sum_argument_gradients(index_arguments(args, kwargs), site.axis)
    routing = find_routing(args, kwargs)
    index, weights = _mask_remote_choices(
        site, values[routing.index], values[routing.weights], _count_local_experts(site, site.module)
    )
    values |= {routing.index: index, routing.weights: weights}
    return all_reduce(run_experts(site, run, *split_arguments(values, len(args))), site.axis)


def run_experts(site: HookSite, run: Forward, args: Sequence[object], kwargs: Mapping[str, object]) -> torch.Tensor:
    """Run experts so that backward reaches inputs and parameters even if no token is routed to this rank's experts.

    Such a rank would have no gradient for them, and code that works on all gradients, such as clipping, would call
    other collectives there than on the other ranks.
    """
    values = index_arguments(args, kwargs)
    if has_sharded_experts(site.module) and _has_strict_expert_ids(site.module):
        index = find_routing(args, kwargs).index
        chosen = values[index]
        assert isinstance(chosen, torch.Tensor)
        values[index] = chosen.clamp(max=_count_local_experts(site, site.module) - 1)
    positional, named = split_arguments(values, len(args))
    output: torch.Tensor = run(*positional, **named)
    if output.requires_grad or not torch.is_grad_enabled():
        return output
    own = [
        local_tensor(value)  # type: ignore[arg-type]
        for value in site.module._parameters.values()
        if isinstance(value, DTensor)
    ]
    return add_dependency(output, *values.values(), *own)


def mask_router_output(site: HookSite, run: Forward, *args: object, **kwargs: object) -> object:
    """Mask and renumber a router's choices; each rank uses part of the scores, so their gradient is summed.

    Raises:
        PlanError: the router returns no scores together with the numbers of experts.
    """
    outputs = run(*args, **kwargs)
    if not isinstance(outputs, tuple):
        raise build_hook_error(
            site,
            "which does not return scores and indices",
            hint=f"remove the entry, and use {DISPATCH_STYLE!r} for the experts beside it",
        )
    routing = find_routing(outputs, {})
    assert isinstance(routing.index, int)
    assert isinstance(routing.weights, int)
    scores = all_reduce_gradient(outputs[routing.weights], site.axis)
    masked = list(outputs)
    masked[routing.index], masked[routing.weights] = _mask_remote_choices(
        site, outputs[routing.index], scores, _count_sibling_experts(site)
    )
    return tuple(masked)


def find_routing(args: Sequence[object], kwargs: Mapping[str, object]) -> Routing:
    """Find the chosen experts, the only tensor of integers, and their weights, the nearest tensor of the same shape.

    Raises:
        PlanError: there is no such pair.
    """
    values = index_arguments(args, kwargs)
    tensors = {key: value for key, value in values.items() if isinstance(value, torch.Tensor)}
    chosen = [key for key, value in tensors.items() if not value.is_floating_point() and value.ndim > 1]
    if len(chosen) == 1:
        (index,) = chosen
        shape = tensors[index].shape
        candidates = [key for key, value in tensors.items() if value.is_floating_point() and value.shape == shape]
        if candidates:
            order = list(tensors)
            return Routing(index, min(candidates, key=lambda key: abs(order.index(key) - order.index(index))))
    raise PlanError(
        "no pair of expert numbers and weights among "
        + ", ".join(f"{list(value.shape)} {value.dtype}" for value in tensors.values()),
        hint="expert parallel styles need `[tokens, top_k]` expert numbers and weights of the same shape",
    )


def _has_strict_expert_ids(module: nn.Module) -> bool:
    """Return whether experts may accept only numbers of experts, so that a choice of another rank must become one.

    A model's own code may: that of some classes does in every release, and all of it before transformers 5.18. The
    choice's weight is 0, so the expert's work on it is wasted but has no effect.
    """
    return getattr(getattr(module, "config", None), "_experts_implementation", None) in (None, "eager")


def _mask_remote_choices(
    site: HookSite, index: object, weights: object, local_count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    assert isinstance(index, torch.Tensor)
    assert isinstance(weights, torch.Tensor)
    elsewhere = index // local_count != site.axis.get_local_rank()
    return torch.where(elsewhere, local_count, index % local_count), weights.masked_fill(elsewhere, 0.0)


def _count_local_experts(site: HookSite, module: nn.Module) -> int:
    """Return the number of experts of each rank, from the global number: FSDP cuts the local one between calls."""
    count = _count_experts(module)
    assert count is not None, "checked before the module was hooked"
    return count // site.axis.size()


def _count_sibling_experts(site: HookSite) -> int:
    return next(_count_local_experts(site, module) for module in site.siblings if has_sharded_experts(module))


def _check_router(site: HookSite) -> None:
    if not any(map(has_sharded_experts, site.siblings)):
        raise build_hook_error(
            site,
            "beside which no experts are divided over the ranks",
            hint=suggest_removal(site),
        )


ROUTING_STYLES = (
    ParallelStyle("grouped_gemm", shard=shard_experts),
    ParallelStyle(
        DISPATCH_STYLE,
        dispatch_experts,
        check_sharded_experts,
        takes="whole",
        gives="whole",
        sums="its parts",
        own=(LocalParameters("module", (Shard(0),)),),
    ),
    ParallelStyle(ROUTER_STYLE, mask_router_output, _check_router),
)
