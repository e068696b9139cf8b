"""gpt-oss experts as MXFP4 checkpoints store them: blocks of two values a byte, and a scale for each block."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["PackedExperts"]

_BLOCK = 32
"""Values that share a scale."""


class PackedExperts(nn.Module):
    """Holds what is stored in place of stacked experts.

    Args:
        experts: with `gate_up_proj` and `down_proj`, [experts, in, out], and a bias for each, [experts, out].
    """

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        for name in ("gate_up_proj", "down_proj"):
            count, inputs, outputs = experts.get_parameter(name).shape
            blocks = count, outputs, inputs // _BLOCK
            setattr(self, f"{name}_blocks", _make_meta_parameter(*blocks, _BLOCK // 2))
            setattr(self, f"{name}_scales", _make_meta_parameter(*blocks))
            setattr(self, f"{name}_bias", experts.get_parameter(f"{name}_bias"))


def _make_meta_parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=torch.uint8, device="meta"), requires_grad=False)
