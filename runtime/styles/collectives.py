"""Collectives with the gradients that tensor parallelism needs, on plain local tensors.

Every rank computes the same loss from the same whole outputs, so the gradient of a whole tensor is the same on all
ranks, except where each rank uses it for its own shard: there it is partial and must be summed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh

from runtime.tensor_map.tensor_map import chunk_bounds

__all__ = [
    "add_dependency",
    "all_gather",
    "all_reduce",
    "all_reduce_gradient",
    "all_reduce_gradients",
    "reduce_scatter",
    "split",
]

# torch 2.13 renames these and warns about the old names.
_ALL_GATHER = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


def all_reduce(tensor: torch.Tensor, axis: DeviceMesh, *, may_overwrite: bool = False) -> torch.Tensor:
    """Sum the ranks' partial tensors; the gradient passes unchanged.

    Args:
        tensor: the partial tensor, of the same shape on every rank.
        axis: the mesh axis.
        may_overwrite: whether the caller alone holds the tensor, so that without gradients it may be summed in place.
    """
    if not torch.is_grad_enabled():
        return _sum_in_place(tensor, axis) if may_overwrite and tensor.is_contiguous() else _sum_copy(tensor, axis)
    result: torch.Tensor = _AllReduce.apply(tensor, axis)  # type: ignore[no-untyped-call]
    return result


def all_reduce_gradient(tensor: torch.Tensor, axis: DeviceMesh) -> torch.Tensor:
    """Return a whole tensor unchanged; its gradient, partial on each rank, is summed."""
    (result,) = all_reduce_gradients((tensor,), axis)
    return result


def all_reduce_gradients(tensors: Sequence[torch.Tensor], axis: DeviceMesh) -> tuple[torch.Tensor, ...]:
    """Return whole tensors unchanged; their gradients, partial on each rank, are summed in one collective."""
    needed = [tensor for tensor in tensors if tensor.requires_grad] if torch.is_grad_enabled() else []
    if not needed:
        return tuple(tensors)
    summed = iter(_AllReduceGradients.apply(axis, *needed))  # type: ignore[no-untyped-call]
    return tuple(next(summed) if tensor.requires_grad else tensor for tensor in tensors)


def add_dependency(output: torch.Tensor, *inputs: object) -> torch.Tensor:
    """Return an output that depends on its inputs even if this rank computed nothing from them.

    Otherwise a rank whose experts received no token would not take part in the collectives of backward.
    """
    needed = [value for value in inputs if isinstance(value, torch.Tensor) and value.requires_grad]
    if output.requires_grad or not needed or not torch.is_grad_enabled():
        return output
    result: torch.Tensor = _AddDependency.apply(output, *needed)  # type: ignore[no-untyped-call]
    return result


def all_gather(tensor: torch.Tensor, axis: DeviceMesh, width: int, dim: int = -1) -> torch.Tensor:
    """Join the ranks' chunks along a dim; the gradient is split.

    Args:
        tensor: this rank's chunk, as `torch.chunk` would split the result.
        axis: the mesh axis.
        width: the size of that dim of the result.
        dim: the dim of the tensor.
    """
    result: torch.Tensor = _AllGather.apply(tensor, axis, width, dim)  # type: ignore[no-untyped-call]
    return result


def split(tensor: torch.Tensor, axis: DeviceMesh, dim: int = -1) -> torch.Tensor:
    """Return this rank's chunk of a whole tensor along a dim; the gradient is gathered."""
    result: torch.Tensor = _TakeChunk.apply(tensor, axis, dim, False)  # type: ignore[no-untyped-call]
    return result


def reduce_scatter(tensor: torch.Tensor, axis: DeviceMesh, dim: int) -> torch.Tensor:
    """Sum the ranks' partial tensors and return this rank's chunk along a dim; the gradient is gathered.

    Args:
        tensor: the partial tensor, of the whole size; the axis must divide the dim.
        axis: the mesh axis.
        dim: the dim of the tensor.
    """
    result: torch.Tensor = _TakeChunk.apply(tensor, axis, dim, True)  # type: ignore[no-untyped-call]
    return result


def _sum_copy(tensor: torch.Tensor, axis: DeviceMesh) -> torch.Tensor:
    # A copy, because the module may have saved its output for its own backward.
    return _sum_in_place(tensor.clone(memory_format=torch.contiguous_format), axis)


def _sum_in_place(tensor: torch.Tensor, axis: DeviceMesh) -> torch.Tensor:
    dist.all_reduce(tensor, group=axis.get_group())
    return tensor


def _sum_coalesced(tensors: Sequence[torch.Tensor], axis: DeviceMesh) -> tuple[torch.Tensor, ...]:
    """Sum each tensor over the ranks, in one collective if they have one dtype."""
    if len({tensor.dtype for tensor in tensors}) > 1:
        return tuple(_sum_copy(tensor, axis) for tensor in tensors)
    if len(tensors) == 1:
        return (_sum_copy(tensors[0], axis),)
    flat = _sum_in_place(torch.cat([tensor.reshape(-1) for tensor in tensors]), axis)
    parts = torch.split(flat, [tensor.numel() for tensor in tensors])
    return tuple(part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True))


def _gather_chunks(tensor: torch.Tensor, axis: DeviceMesh, width: int, dim: int) -> torch.Tensor:
    if width % axis.size():
        return _gather_uneven_chunks(tensor, axis, width, dim)
    chunks = tensor.new_empty(axis.size() * tensor.shape[0], *tensor.shape[1:])
    _ALL_GATHER(chunks, tensor.contiguous(), group=axis.get_group())
    # The chunks lie one after the other already; otherwise torch.cat copies faster than a strided view would.
    if tensor.shape[:dim].numel() == 1:
        return chunks.view(*tensor.shape[:dim], width, *tensor.shape[dim:][1:])
    return torch.cat(chunks.view(axis.size(), *tensor.shape).unbind(), dim)


def _gather_uneven_chunks(tensor: torch.Tensor, axis: DeviceMesh, width: int, dim: int) -> torch.Tensor:
    lengths = [chunk_bounds(width, axis.size(), index)[1] for index in range(axis.size())]
    last = tensor.movedim(dim, -1)
    padded = nn.functional.pad(last, (0, lengths[0] - last.shape[-1])).movedim(-1, dim).contiguous()
    chunks = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(chunks, padded, group=axis.get_group())
    return torch.cat([chunk.narrow(dim, 0, length) for chunk, length in zip(chunks, lengths, strict=True)], dim=dim)


def _take_chunk(tensor: torch.Tensor, axis: DeviceMesh, dim: int) -> torch.Tensor:
    return tensor.narrow(dim, *chunk_bounds(tensor.shape[dim], axis.size(), axis.get_local_rank())).contiguous()


def _sum_and_take_chunk(tensor: torch.Tensor, axis: DeviceMesh, dim: int) -> torch.Tensor:
    group = axis.get_group()
    # gloo lacks reduce-scatter in some torch versions from 2.8 on, and a group's backend name is not always known.
    if not tensor.is_cuda:
        return _take_chunk(_sum_copy(tensor, axis), axis, dim)
    chunks = torch.cat(tensor.chunk(axis.size(), dim))
    result = chunks.new_empty(chunks.shape[0] // axis.size(), *chunks.shape[1:])
    _REDUCE_SCATTER(result, chunks, group=group)
    return result


class _CollectiveContext(Protocol):
    axis: DeviceMesh
    width: int
    dim: int
    inputs: list[torch.Tensor]
    device: torch.device


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _CollectiveContext, tensor: torch.Tensor, axis: DeviceMesh) -> torch.Tensor:
        return _sum_copy(tensor, axis)

    @staticmethod
    @once_differentiable
    def backward(ctx: _CollectiveContext, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0], None


class _AllReduceGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _CollectiveContext, axis: DeviceMesh, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.axis = axis
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: _CollectiveContext, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, *_sum_coalesced(gradients, ctx.axis)


class _AddDependency(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _CollectiveContext, output: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        ctx.inputs = [torch.empty_like(tensor, device="meta") for tensor in inputs]
        ctx.device = output.device
        return output.view_as(output)

    @staticmethod
    @once_differentiable
    def backward(ctx: _CollectiveContext, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, *(torch.zeros_like(tensor, device=ctx.device) for tensor in ctx.inputs)


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _CollectiveContext, tensor: torch.Tensor, axis: DeviceMesh, width: int, dim: int) -> torch.Tensor:
        ctx.axis, ctx.dim = axis, dim
        return _gather_chunks(tensor, axis, width, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: _CollectiveContext, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return _take_chunk(gradients[0], ctx.axis, ctx.dim), None, None, None


class _TakeChunk(torch.autograd.Function):
    """Takes this rank's chunk of a whole tensor, or of the sum of partial ones; backward gathers in both cases."""

    @staticmethod
    def forward(
        ctx: _CollectiveContext, tensor: torch.Tensor, axis: DeviceMesh, dim: int, partial: bool
    ) -> torch.Tensor:
        ctx.axis, ctx.width, ctx.dim = axis, tensor.shape[dim], dim
        return _sum_and_take_chunk(tensor, axis, dim) if partial else _take_chunk(tensor, axis, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: _CollectiveContext, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return _gather_chunks(gradients[0], ctx.axis, ctx.width, ctx.dim), None, None, None
