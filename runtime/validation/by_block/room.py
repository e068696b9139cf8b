"""Whether models fit in memory whole, and how exactly they can be compared block by block where they do not."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import nn

from runtime.parallel.fsdp import count_gathered, count_gathered_at_once
from runtime.processes.agreement import all_gather_json
from runtime.processes.thread_ranks import find_thread_device
from runtime.validation.by_block.blocks import find_block_of, find_blocks
from runtime.validation.local import OVERHEAD_FACTOR, detach_local, read_free_bytes
from runtime.validation.precision import FLOAT32, FLOAT64, Precision

__all__ = ["choose_block_precision", "fits_whole"]


def fits_whole(model: nn.Module, device: torch.device) -> bool:
    """Return whether two whole models in float32 fit in memory, the unsharded one over all ranks. Collective.

    What FSDP gathers at once is counted with them.

    Args:
        model: the rank's parallel model; only the sizes of its parameters matter.
        device: the device that this rank computes on.
    """
    whole: float = sum(parameter.numel() for parameter in model.parameters())
    own = sum(detach_local(parameter).numel() for parameter in model.parameters()) + count_gathered_at_once(model)
    # Processes that have memory of their own share an unsharded model by FSDP, which threads cannot do for less.
    if find_thread_device() is None and device.type == "cuda":
        whole = min(whole, whole / dist.get_world_size() + count_gathered_at_once(model, torch.Tensor.numel))
    return _fits(2 * _per_rank(whole, own), torch.float32, device)


def choose_block_precision(model: nn.Module, device: torch.device) -> Precision:
    """Return the most exact precision in which the largest block fits in every rank's memory. Collective.

    Args:
        model: the rank's parallel model; only the sizes of its parameters matter.
        device: the device that this rank computes on.
    """
    whole, own = _find_largest_block(model)
    # At most a block's whole weights and gradients, or its whole gradients and the ranks' weights and gradients, their
    # own and those that FSDP gathers.
    most = max(2 * whole, whole + 2 * (_per_rank(0, own)))
    return FLOAT64 if _fits(most, torch.float64, device) else FLOAT32


def _find_largest_block(model: nn.Module) -> tuple[int, int]:
    blocks: Mapping[str, nn.Module] = find_blocks(model)
    whole, own = dict.fromkeys(blocks, 0), dict.fromkeys(blocks, 0)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if (block := find_block_of(blocks, name)) is not None:
            whole[block] += parameter.numel()
            own[block] += detach_local(parameter).numel() + count_gathered(parameter)
    return max(whole.values(), default=0), max(own.values(), default=0)


def _per_rank(whole: float, own: float) -> float:
    """Return the elements in the memory that ranks share, or in a rank's own."""
    return whole + own * (dist.get_world_size() if find_thread_device() is not None else 1)


def _fits(elements: float, dtype: torch.dtype, device: torch.device) -> bool:
    free = read_free_bytes(device)
    fits: list[bool] = all_gather_json(free is None or dtype.itemsize * elements * OVERHEAD_FACTOR <= free)
    return all(fits)
