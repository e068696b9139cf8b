"""Whether a whole model has room on one rank's device."""

from __future__ import annotations

import gc
from pathlib import Path

import torch
from torch import nn

from runtime.validation.local_tensors import detach_local

__all__ = ["fits_in_memory", "free_memory"]

_OVERHEAD_FACTOR = 1.2
"""What activations and the allocator take besides, as a factor."""
_FLOAT32_BYTES = 4


def fits_in_memory(model: nn.Module, device: torch.device) -> bool:
    """Say whether a model's weights and gradients fit unsharded, in float32, beside what the rank holds of it already.

    Args:
        model: on meta or not, whole or sharded; its own gradients are still to come.
        device: that it would be on.
    """
    whole = sum(parameter.numel() for parameter in model.parameters())
    own = sum(detach_local(parameter).numel() for parameter in model.parameters())
    free = _read_free_bytes(device)
    return free is None or _FLOAT32_BYTES * (2 * whole + own) * _OVERHEAD_FACTOR <= free


def free_memory(device: torch.device) -> None:
    """Give back the memory of models that nobody has any more: hooked modules and their hooks hold each other."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _read_free_bytes(device: torch.device) -> int | None:
    """Return the bytes that can be allocated, None where that cannot be told."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    try:
        lines = Path("/proc/meminfo").read_text("utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
