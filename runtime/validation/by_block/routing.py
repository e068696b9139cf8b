"""The routing of a parallel block against the unsharded block's: the same experts, unless weights tie."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from plans.errors import PlanError
from runtime.styles.call import index_arguments, split_arguments
from runtime.styles.routing import Routing, find_routing
from runtime.validation.by_block.unsharded import Choices

__all__ = ["RoutingDifference", "follow_choices"]


@dataclass
class RoutingDifference:
    """How many tokens chose other experts than in the unsharded block.

    Args:
        wrong: tokens whose experts have other weights, so that the routers disagree.
        tied: tokens between whose experts only rounding decides.
    """

    wrong: int = 0
    tied: int = 0


@contextmanager
def follow_choices(
    model: nn.Module, choices: Mapping[str, Choices], tolerance: float, difference: RoutingDifference
) -> Iterator[None]:
    """Compare the routing with the unsharded block's, and take that where only rounding decides.

    Args:
        model: the parallel model.
        choices: the unsharded block's routing by the experts' module.
        tolerance: how far weights that tie may be apart, relative to the largest.
        difference: what differs, to be extended.
    """
    with ExitStack() as stack:
        for name, expected in choices.items():
            handle = model.get_submodule(name).register_forward_pre_hook(
                partial(_compare_choices, expected, tolerance, difference), with_kwargs=True
            )
            stack.callback(handle.remove)
        yield


def _compare_choices(
    expected: Choices,
    tolerance: float,
    difference: RoutingDifference,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    try:
        routing: Routing = find_routing(args, kwargs)
    except PlanError:
        difference.wrong += len(expected.index)
        return None
    values = index_arguments(args, kwargs)
    index, weights = values[routing.index], values[routing.weights]
    assert isinstance(index, torch.Tensor)
    assert isinstance(weights, torch.Tensor)
    if index.shape != expected.index.shape:
        difference.wrong += len(expected.index)
        return None
    other = (index.sort(-1).values != expected.index.sort(-1).values).any(-1)
    if not bool(other.any()):
        return None
    gaps = (weights.detach().sort(-1).values - expected.weights.sort(-1).values).abs()
    ties = other & (gaps <= tolerance * expected.weights.abs().max()).all(-1)
    difference.tied += int(ties.sum())
    difference.wrong += int((other & ~ties).sum())
    values[routing.index] = torch.where(ties.unsqueeze(-1), expected.index, index)
    positional, named = split_arguments(values, len(args))
    return tuple(positional), dict(named)
