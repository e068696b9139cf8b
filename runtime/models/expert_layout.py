"""How the parameters of stacked experts lie in memory, read from their shapes and from the flags of their class."""

from __future__ import annotations

import torch
from torch import nn

from plans.model_facts import ExpertLayout

__all__ = ["read_expert_layout"]


def read_expert_layout(name: str, module: nn.Module) -> ExpertLayout | None:
    """Return an experts module's layout by its parameters' shapes and its class's flags, None for other modules.

    Args:
        name: the module's name in the model.
        module: the module.
    """
    down = getattr(module, "down_proj", None)
    gate_up = getattr(module, "gate_up_proj", None)
    if not (isinstance(down, torch.Tensor) and down.ndim == 3):
        return None
    where = f"{type(module).__name__} at {name}"
    if not isinstance(gate_up, torch.Tensor):
        return ExpertLayout(where, gated=False)
    is_regular = gate_up.ndim == 3 and gate_up.shape[1] == 2 * down.shape[2] and gate_up.shape[2] == down.shape[1]
    return ExpertLayout(
        where,
        gated=bool(getattr(module, "has_gate", True)),
        transposed=bool(getattr(module, "is_transposed", False)) or not is_regular,
        concatenated=bool(getattr(module, "is_concatenated", True)),
        biased=bool(getattr(module, "has_bias", False)),
    )
