"""Replicated tensors: where GPUs are joined, each rank reads a share of what all of them hold and sends it on."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist

from runtime.loader.parameter_refs import ParameterRef, mesh_axes
from runtime.processes.group import uses_nccl

__all__ = ["assign_readers", "broadcast_tensors"]

_MIN_BROADCAST_BYTES = 64 * 2**20
"""Bytes in all below which ranks read for themselves."""


def assign_readers(refs: Mapping[str, ParameterRef], local_tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Return which rank reads each tensor that all ranks hold whole; empty where every rank reads for itself.

    Over NCCL, links between GPUs are several times as fast as reading is; over gloo they are slower, in one machine
    anyway.

    Args:
        refs: of a model, the same ones on every rank.
        local_tensors: their tensors in memory.
    """
    axes = mesh_axes(refs.values())
    ranks = 1
    for axis in axes:
        ranks *= axis.size()
    if ranks == 1 or ranks != dist.get_world_size() or not uses_nccl():
        return {}
    sizes = {
        name: local_tensors[name].nbytes for name, slot in refs.items() if slot.is_whole and local_tensors[name].is_cuda
    }
    return assign_by_size(sizes, ranks) if sum(sizes.values()) >= _MIN_BROADCAST_BYTES else {}


def assign_by_size(sizes: Mapping[str, int], ranks: int) -> dict[str, int]:
    """Deal tensors out to ranks, the largest first, each to the one that has the fewest bytes by then.

    Args:
        sizes: bytes by name, the same on every rank.
        ranks: how many there are.
    """
    loads = [0] * ranks
    dealt: dict[str, int] = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        dealt[name] = loads.index(min(loads))
        loads[dealt[name]] += sizes[name]
    return dealt


def broadcast_tensors(assigned: Mapping[str, int], local_tensors: Mapping[str, torch.Tensor]) -> None:
    """Send every dealt tensor from the rank that read it to all others; every rank calls this.

    Args:
        assigned: rank by name, the same on every rank.
        local_tensors: the tensors.
    """
    # As bytes: NCCL knows neither 16-bit integers nor every 8-bit float.
    waiting = [
        dist.broadcast(local_tensors[name].view(-1).view(torch.uint8), src=rank, async_op=True)
        for name, rank in assigned.items()
    ]
    for work in waiting:
        assert work is not None
        work.wait()
