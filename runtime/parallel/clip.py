"""Clip gradients by their total norm, whatever mesh each parameter is sharded over."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from plans.errors import UsageError

__all__ = ["clip_grad_norm"]

_EPSILON = 1e-6

Groups = tuple[ProcessGroup, ...]


@torch.no_grad()
def clip_grad_norm(model: nn.Module | Iterable[torch.Tensor], max_norm: float) -> torch.Tensor:
    """Scale gradients in place so that their total norm is at most `max_norm`. Collective: every rank must call it.

    The norm is that of the unsharded model's gradients, the root of the sum of all squares: shards are summed over the
    ranks that hold them, and replicated gradients count once. torch's own `clip_grad_norm_` accepts the parameters of
    one mesh only.

    Args:
        model: a model after backward, parallel or not, or some of its parameters, the same ones on every rank.
        max_norm: the largest norm allowed.

    Returns:
        The norm before clipping, a float32 scalar on the parameters' device.

    Raises:
        UsageError: `max_norm` is negative, or there are no parameters.
    """
    if max_norm < 0:
        raise UsageError(f"max_norm must be at least 0, got {max_norm}", hint="pass 0 or more", max_norm=max_norm)
    tensors = list(model.parameters() if isinstance(model, nn.Module) else model)
    parameters = [parameter for parameter in dict.fromkeys(tensors) if parameter.requires_grad]
    if not parameters:
        raise UsageError("there are no parameters with gradients to clip", hint="pass the model, or its parameters")
    norm = _sum_squared_norms(parameters).sqrt()
    scale = (max_norm / (norm + _EPSILON)).clamp(max=1.0)
    for parameter in parameters:
        if parameter.grad is not None:
            gradient = _get_local(parameter.grad)
            gradient.mul_(scale.to(gradient.device))
    return norm


def _sum_squared_norms(parameters: list[torch.Tensor]) -> torch.Tensor:
    """Return the sum of all gradients' squares, with one all-reduce per set of process groups that shard gradients."""
    sums: dict[Groups, list[torch.Tensor]] = defaultdict(list)
    home = _get_local(parameters[0]).device
    for parameter in parameters:
        # Parameters without a gradient count too: a rank that has none must still take part in the all-reduce.
        sums[_find_shard_groups(parameter)].append(_compute_squared_norm(parameter.grad, home))
    total = torch.zeros((), device=home)
    for groups, squares in sums.items():
        square = torch.stack(squares).sum()
        for group in groups:
            dist.all_reduce(square, group=group)
        total += square
    return total


def _find_shard_groups(parameter: torch.Tensor) -> Groups:
    """Return the process groups, one for each mesh axis, whose ranks hold different shards of a parameter."""
    if not isinstance(parameter, DTensor):
        return ()
    mesh = parameter.device_mesh
    return tuple(mesh.get_group(axis) for axis, place in enumerate(parameter.placements) if not place.is_replicate())


def _compute_squared_norm(gradient: torch.Tensor | None, device: torch.device) -> torch.Tensor:
    if gradient is None:
        return torch.zeros((), device=device)
    norm: torch.Tensor = torch.linalg.vector_norm(_get_local(gradient), dtype=torch.float32)
    return norm.to(device).square()


def _get_local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
