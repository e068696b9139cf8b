"""Replicated tensors: over NCCL each rank reads a share of them and broadcasts it to the others."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist

from runtime.loader.parameter_refs import ParameterRef, mesh_axes
from runtime.processes.group import uses_nccl

__all__ = ["assign_readers", "broadcast_tensors"]

_MIN_BROADCAST_BYTES = 64 * 2**20
"""Total bytes below which each rank reads replicated tensors itself."""


def assign_readers(refs: Mapping[str, ParameterRef], local_tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Return the rank that reads each replicated tensor; empty if every rank reads them itself.

    Broadcasts over NCCL are several times as fast as reading files; over gloo, at least on one machine, they are
    slower.

    Args:
        refs: the model's tensors by name, the same on every rank.
        local_tensors: the memory of each.
    """
    axes = mesh_axes(refs.values())
    ranks = 1
    for axis in axes:
        ranks *= axis.size()
    if ranks == 1 or ranks != dist.get_world_size() or not uses_nccl():
        return {}
    sizes = {
        name: local_tensors[name].nbytes for name, ref in refs.items() if ref.is_whole and local_tensors[name].is_cuda
    }
    return assign_by_size(sizes, ranks) if sum(sizes.values()) >= _MIN_BROADCAST_BYTES else {}


def assign_by_size(sizes: Mapping[str, int], ranks: int) -> dict[str, int]:
    """Assign tensors to ranks, the largest first, each to the rank with the fewest bytes so far.

    Args:
        sizes: the bytes of each tensor by name, the same on every rank.
        ranks: the number of ranks.
    """
    loads = [0] * ranks
    assigned: dict[str, int] = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        assigned[name] = loads.index(min(loads))
        loads[assigned[name]] += sizes[name]
    return assigned


def broadcast_tensors(assigned: Mapping[str, int], local_tensors: Mapping[str, torch.Tensor]) -> None:
    """Broadcast each assigned tensor from the rank that read it. All ranks must call this.

    Args:
        assigned: the rank that read each tensor, by name, the same on every rank.
        local_tensors: the memory of each tensor.
    """
    # As bytes, because NCCL supports neither 16-bit integers nor all 8-bit floats.
    broadcasts = [
        dist.broadcast(local_tensors[name].view(-1).view(torch.uint8), src=rank, async_op=True)
        for name, rank in assigned.items()
    ]
    for work in broadcasts:
        assert work is not None
        work.wait()
