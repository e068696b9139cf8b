"""Replicated tensors: where GPUs are joined, each rank reads a share of what all of them hold and sends it on."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist

from runtime.loader.slots import Slot, mesh_axes
from runtime.processes.backends import over_nccl

__all__ = ["broadcast", "readers"]

_LEAST = 64 * 2**20
"""Bytes in all below which ranks read for themselves."""


def readers(slots: Mapping[str, Slot], locals_: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Return which rank reads each tensor that all ranks hold whole; empty where every rank reads for itself.

    Over NCCL, links between GPUs are several times as fast as reading is; over gloo they are slower, in one machine
    anyway.

    Args:
        slots: of a model, the same ones on every rank.
        locals_: their tensors in memory.
    """
    axes = mesh_axes(slots.values())
    ranks = 1
    for axis in axes:
        ranks *= axis.size()
    if ranks == 1 or ranks != dist.get_world_size() or not over_nccl():
        return {}
    sizes = {name: locals_[name].nbytes for name, slot in slots.items() if slot.is_whole and locals_[name].is_cuda}
    return shares(sizes, ranks) if sum(sizes.values()) >= _LEAST else {}


def shares(sizes: Mapping[str, int], ranks: int) -> dict[str, int]:
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


def broadcast(dealt: Mapping[str, int], locals_: Mapping[str, torch.Tensor]) -> None:
    """Send every dealt tensor from the rank that read it to all others; every rank calls this.

    Args:
        dealt: rank by name, the same on every rank.
        locals_: the tensors.
    """
    # As bytes: NCCL knows neither 16-bit integers nor every 8-bit float.
    waiting = [
        dist.broadcast(locals_[name].view(-1).view(torch.uint8), src=rank, async_op=True)
        for name, rank in dealt.items()
    ]
    for work in waiting:
        assert work is not None
        work.wait()
