"""Collectives with the gradients that tensor parallelism needs, on plain local tensors.

Every rank computes the same loss from the same whole outputs, so the gradient of a whole tensor is the same on all
ranks, except where each rank uses it for its own shard: there it is partial and must be summed.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from runtime.checkpoint.extents import chunk_bounds

__all__ = ["all_gather", "all_reduce", "all_reduce_gradient", "split"]


def all_reduce(tensor: torch.Tensor, axis: DeviceMesh) -> torch.Tensor:
    """Sum the ranks' partial tensors; the gradient passes as it is."""
    result: torch.Tensor = _AllReduce.apply(tensor, axis)  # type: ignore[no-untyped-call]
    return result


def all_reduce_gradient(tensor: torch.Tensor, axis: DeviceMesh) -> torch.Tensor:
    """Return the whole tensor as it is; its gradient, partial on each rank, is summed."""
    if not (torch.is_grad_enabled() and tensor.requires_grad):
        return tensor
    result: torch.Tensor = _AllReduceGradient.apply(tensor, axis)  # type: ignore[no-untyped-call]
    return result


def all_gather(tensor: torch.Tensor, axis: DeviceMesh, width: int) -> torch.Tensor:
    """Join the ranks' chunks along the last dim; the gradient is split.

    Args:
        tensor: this rank's chunk, as `torch.chunk` cuts `width`.
        axis: the mesh axis.
        width: of the last dim of the result.
    """
    result: torch.Tensor = _AllGather.apply(tensor, axis, width)  # type: ignore[no-untyped-call]
    return result


def split(tensor: torch.Tensor, axis: DeviceMesh) -> torch.Tensor:
    """Return this rank's chunk along the last dim of a whole tensor; the gradient is gathered."""
    result: torch.Tensor = _Split.apply(tensor, axis)  # type: ignore[no-untyped-call]
    return result


def _sum(tensor: torch.Tensor, axis: DeviceMesh) -> torch.Tensor:
    # A copy, because the module may have saved what it returned for its own backward.
    result = tensor.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(result, group=axis.get_group())
    return result


def _join(tensor: torch.Tensor, axis: DeviceMesh, width: int) -> torch.Tensor:
    lengths = [chunk_bounds(width, axis.size(), index)[1] for index in range(axis.size())]
    padded = nn.functional.pad(tensor, (0, lengths[0] - tensor.shape[-1])).contiguous()
    pieces = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(pieces, padded, group=axis.get_group())
    return torch.cat([piece[..., :length] for piece, length in zip(pieces, lengths, strict=True)], dim=-1)


def _own(tensor: torch.Tensor, axis: DeviceMesh) -> torch.Tensor:
    return tensor.narrow(-1, *chunk_bounds(tensor.shape[-1], axis.size(), axis.get_local_rank())).contiguous()


class _Context(Protocol):
    axis: DeviceMesh
    width: int


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, tensor: torch.Tensor, axis: DeviceMesh) -> torch.Tensor:
        return _sum(tensor, axis)

    @staticmethod
    def backward(ctx: _Context, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0], None


class _AllReduceGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, tensor: torch.Tensor, axis: DeviceMesh) -> torch.Tensor:
        ctx.axis = axis
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: _Context, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _sum(gradients[0], ctx.axis), None


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, tensor: torch.Tensor, axis: DeviceMesh, width: int) -> torch.Tensor:
        ctx.axis = axis
        return _join(tensor, axis, width)

    @staticmethod
    def backward(ctx: _Context, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _own(gradients[0], ctx.axis), None, None


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, tensor: torch.Tensor, axis: DeviceMesh) -> torch.Tensor:
        ctx.axis, ctx.width = axis, tensor.shape[-1]
        return _own(tensor, axis)

    @staticmethod
    def backward(ctx: _Context, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _join(gradients[0], ctx.axis, ctx.width), None
