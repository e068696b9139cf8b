"""Slices of the sequence: activations sharded along the sequence, as DTensors of the whole sequence's shape.

Between hooks the residual stream flows through model code, which reads its shape and adds tensors to it. As a DTensor
it has the shape of the whole sequence there, and mixing it with a plain tensor raises instead of computing a wrong
number.
"""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from plans.errors import IndivisibleError
from runtime.styles.collectives import all_gather, reduce_scatter, split

__all__ = ["SEQUENCE_DIM", "gather_slice", "reduce_scatter_slice", "shard_activation", "take_local_slice", "wrap_slice"]

SEQUENCE_DIM = 1
"""The dim of activations, `[batch, sequence, hidden]`, that is the sequence."""


def wrap_slice(local: torch.Tensor, axis: DeviceMesh, dim: int = SEQUENCE_DIM) -> torch.Tensor:
    """Return this rank's slice as a DTensor of the whole sequence's shape."""
    return DTensor.from_local(local, axis, [Shard(dim)], run_check=False)


def gather_slice(value: torch.Tensor, axis: DeviceMesh) -> torch.Tensor:
    """Return the whole tensor of a slice on every rank; a tensor that is whole already is returned unchanged."""
    if not isinstance(value, DTensor):
        return value
    (placement,) = value.placements
    if not isinstance(placement, Shard):
        return value.to_local()
    return all_gather(value.to_local(), axis, value.shape[placement.dim], placement.dim)


def take_local_slice(value: torch.Tensor, axis: DeviceMesh, dim: int = SEQUENCE_DIM) -> torch.Tensor:
    """Return this rank's slice of a DTensor or of a whole tensor, as a plain tensor.

    Raises:
        IndivisibleError: the axis does not divide the sequence.
    """
    if isinstance(value, DTensor):
        return value.to_local()
    _check_length(value.shape[dim], axis)
    return split(value, axis, dim)


def shard_activation(value: torch.Tensor, axis: DeviceMesh, dim: int = SEQUENCE_DIM) -> torch.Tensor:
    """Return this rank's slice of a whole tensor as a DTensor; a DTensor is returned unchanged."""
    return value if isinstance(value, DTensor) else wrap_slice(take_local_slice(value, axis, dim), axis, dim)


def reduce_scatter_slice(partial: torch.Tensor, axis: DeviceMesh, dim: int = SEQUENCE_DIM) -> torch.Tensor:
    """Sum the ranks' partial tensors and return this rank's slice as a plain tensor.

    Raises:
        IndivisibleError: the axis does not divide the sequence.
    """
    _check_length(partial.shape[dim], axis)
    return reduce_scatter(partial, axis, dim)


def _check_length(length: int, axis: DeviceMesh) -> None:
    if length % axis.size():
        raise IndivisibleError(
            f"tp={axis.size()} does not divide the sequence length, {length}",
            hint=f"pad the batch to {length + -length % axis.size()} tokens, or use a mode other than sp and sp_ep",
            what="the sequence length",
            size=length,
        )
