"""The layout of experts in memory: what an experts module's parameters and its class's flags show."""

from __future__ import annotations

import torch
from torch import nn

from plans.model_facts import ExpertLayout

__all__ = ["read_expert_layout"]


def read_expert_layout(name: str, module: nn.Module) -> ExpertLayout | None:
    """Return an experts module's layout by its parameters' shapes and its decorator's flags, None for other modules."""
    down = getattr(module, "down_proj", None)
    packed = getattr(module, "gate_up_proj", None)
    if not (isinstance(down, torch.Tensor) and down.ndim == 3):
        return None
    where = f"{type(module).__name__} at {name}"
    if not isinstance(packed, torch.Tensor):
        return ExpertLayout(where, gated=False)
    regular = packed.ndim == 3 and packed.shape[1] == 2 * down.shape[2] and packed.shape[2] == down.shape[1]
    return ExpertLayout(
        where,
        gated=bool(getattr(module, "has_gate", True)),
        transposed=bool(getattr(module, "is_transposed", False)) or not regular,
        concatenated=bool(getattr(module, "is_concatenated", True)),
        biased=bool(getattr(module, "has_bias", False)),
    )
