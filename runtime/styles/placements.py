"""Placements in torch: DTensor parameters built, sharded and unwrapped without DTensor's own redistribution.

torch computes strided shards differently from version to version, so every shard is cut here by integer bounds, and a
DTensor only carries its placement and its global shape along with the local tensor.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Placement as TorchPlacement
from torch.distributed.tensor import Replicate as TorchReplicate
from torch.distributed.tensor import Shard as TorchShard
from torch.distributed.tensor.placement_types import _StridedShard

from plans.placement import Packed, Placement, Replicate, Shard
from runtime.tensor_map.tensor_map import chunk_bounds

__all__ = [
    "as_parameter",
    "cut_local_shard",
    "from_torch",
    "get_placement",
    "get_plan_placements",
    "local_tensor",
    "to_torch",
]


def to_torch(placement: Placement) -> TorchPlacement:
    """Return the torch placement that equals a placement."""
    match placement:
        case Replicate():
            return TorchReplicate()
        case Shard(dim):
            return TorchShard(dim)
        case Packed(dim, groups):
            return _StridedShard(dim, split_factor=groups)


def from_torch(placement: TorchPlacement) -> Placement | None:
    """Return the placement that equals a torch placement, None for a partial or unknown one."""
    if isinstance(placement, _StridedShard):
        return Packed(placement.dim, int(placement.split_factor))
    if isinstance(placement, TorchShard):
        return Shard(placement.dim)
    return Replicate() if isinstance(placement, TorchReplicate) else None


def get_plan_placements(tensor: DTensor) -> list[Placement | TorchPlacement]:
    """Return a DTensor's placements as a plan writes them, outermost first; torch's own if a plan has no equal.

    torch's FSDP shards what tensor parallelism left. If that was sharded along dim 0 too, torch describes the outer
    shard as strided by the tensor parallel size, where a plan relies on the order of application.
    """
    placements: list[Placement | TorchPlacement] = [from_torch(place) or place for place in tensor.placements]
    if placements[-1] == Shard(0) and placements[-2:-1] == [Packed(0, tensor.device_mesh.shape[-1])]:
        placements[-2] = Shard(0)
    return placements


def get_placement(tensor: torch.Tensor | None) -> Placement | None:
    """Return a parameter's placement on its innermost mesh axis: `Replicate` for a plain tensor, None for None."""
    if isinstance(tensor, DTensor):
        return from_torch(tensor.placements[-1])
    return None if tensor is None else Replicate()


def cut_local_shard(tensor: torch.Tensor, placement: Placement, size: int, index: int) -> torch.Tensor:
    """Return the shard of a tensor that one rank holds; it may share memory with the tensor.

    Args:
        tensor: the whole tensor, on meta or not.
        placement: the tensor's placement on the mesh axis.
        size: the size of the mesh axis.
        index: the rank's index on the mesh axis.
    """
    match placement:
        case Replicate():
            return tensor
        case Shard(dim):
            return tensor.narrow(dim, *chunk_bounds(tensor.shape[dim], size, index))
        case Packed(dim, groups):
            assert tensor.shape[dim] % (groups * size) == 0, "resolve refuses groups that do not divide"
            parts = tensor.chunk(groups, dim)
            return torch.cat([part.narrow(dim, *chunk_bounds(part.shape[dim], size, index)) for part in parts], dim)


def as_parameter(
    local: torch.Tensor, shape: torch.Size, placement: Placement, axis: DeviceMesh, requires_grad: bool
) -> nn.Parameter:
    """Return a DTensor parameter of a global shape that holds `local` on this rank; nothing is communicated.

    Args:
        local: this rank's shard.
        shape: the global shape.
        placement: the placement on the mesh axis.
        axis: the mesh axis.
        requires_grad: whether the parameter needs gradients.
    """
    sharded = DTensor.from_local(
        local.contiguous(),
        axis,
        [to_torch(placement)],
        run_check=False,
        shape=shape,
        stride=torch.empty(shape, device="meta").stride(),
    )
    return nn.Parameter(sharded, requires_grad=requires_grad)


def local_tensor(parameter: DTensor) -> torch.Tensor:
    """Return a DTensor's local tensor; the gradient reaches the DTensor with the same placement."""
    if not torch.is_grad_enabled():
        return parameter.to_local()
    local: torch.Tensor = _LocalTensor.apply(parameter)  # type: ignore[no-untyped-call]
    return local


class _LocalTensorContext(Protocol):
    mesh: DeviceMesh
    placements: tuple[TorchPlacement, ...]
    shape: torch.Size
    stride: tuple[int, ...]


class _LocalTensor(torch.autograd.Function):
    """`DTensor.to_local`, but with the gradient's shape and placement taken from the parameter, never inferred."""

    @staticmethod
    def forward(ctx: _LocalTensorContext, parameter: DTensor) -> torch.Tensor:
        ctx.mesh, ctx.placements = parameter.device_mesh, parameter.placements
        ctx.shape, ctx.stride = parameter.shape, parameter.stride()
        local = parameter.to_local()
        return local.view_as(local)

    @staticmethod
    def backward(ctx: _LocalTensorContext, *gradients: torch.Tensor) -> DTensor:
        (gradient,) = gradients
        return DTensor.from_local(
            gradient.contiguous(), ctx.mesh, ctx.placements, run_check=False, shape=ctx.shape, stride=ctx.stride
        )
