"""Routing forced alike on both models, so that every expert gets a token, whatever a router would choose.

The routers still run, and their scores still weigh the experts' outputs; only the choice is replaced.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from plans.errors import PlanError
from plans.resolved_plan import ResolvedPlan
from runtime.styles.call import index_arguments, split_arguments
from runtime.styles.routing import ROUTER_STYLE, find_routing

__all__ = ["can_force_routing", "count_experts", "force_routing"]


def can_force_routing(resolved: ResolvedPlan) -> bool:
    """Return whether experts get choices that are still those of all experts, for all tokens, where they are called."""
    return ROUTER_STYLE not in resolved.plan.values() and resolved.mode not in ("sp", "sp_ep")


def count_experts(resolved: ResolvedPlan, idle: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """Return the number of experts, on all ranks together, of each module with some idle ones and some that run.

    Args:
        resolved: the plan of the model.
        idle: the idle experts by the parameter that stacks them.
    """
    counts = {name: resolved.by_name[name].shape[0] for name, experts in idle.items() if experts}
    return {name.rpartition(".")[0]: count for name, count in counts.items() if len(idle[name]) < count}


@contextmanager
def force_routing(model: nn.Module, experts: Mapping[str, int], first: int, forced: set[str]) -> Iterator[None]:
    """Let the tokens of each call choose the experts in turn.

    Args:
        model: the model, parallel or not.
        experts: the number of experts on all ranks, by module.
        first: the expert that the first token chooses.
        forced: the modules whose routing was forced, to be extended.
    """
    with ExitStack() as stack:
        for name, count in experts.items():
            replace_choices = partial(_replace_choices, name, count, first, forced)
            handle = model.get_submodule(name).register_forward_pre_hook(
                replace_choices, with_kwargs=True, prepend=True
            )
            stack.callback(handle.remove)
        yield


def _replace_choices(
    name: str,
    count: int,
    first: int,
    forced: set[str],
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    try:
        routing = find_routing(args, kwargs)
    except PlanError:  # a stack that is not chosen from by numbers
        return args, kwargs
    forced.add(name)
    values = index_arguments(args, kwargs)
    chosen = values[routing.index]
    assert isinstance(chosen, torch.Tensor)
    turns = torch.arange(first, first + chosen.numel(), device=chosen.device)
    values[routing.index] = (turns % count).to(chosen.dtype).reshape(chosen.shape)
    positional, named = split_arguments(values, len(args))
    return tuple(positional), dict(named)
