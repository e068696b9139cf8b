"""Whether a whole model has room on one rank's device."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

__all__ = ["has_room"]

_SPARE = 1.2
"""What activations and the allocator take besides, as a factor."""
_BYTES = 4


def has_room(model: nn.Module, device: torch.device) -> bool:
    """Say whether the weights of a model and their gradients fit unsharded, in float32, into what is free.

    Args:
        model: on meta or not, whole or sharded.
        device: that it would be on.
    """
    elements = sum(parameter.numel() for parameter in model.parameters())
    free = _free(device)
    return free is None or 2 * _BYTES * elements * _SPARE <= free


def _free(device: torch.device) -> int | None:
    """Return the bytes that can be allocated, None where that cannot be told."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text("utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
