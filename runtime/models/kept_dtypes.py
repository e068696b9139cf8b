"""The tensors that a model's class wants in float32 even where the rest of the model has 16 bits."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

__all__ = ["HALF_DTYPES", "compile_kept_names"]

HALF_DTYPES = (torch.float16, torch.bfloat16)


def compile_kept_names(model: nn.Module, dtype: torch.dtype) -> re.Pattern[str] | None:
    """Return what to search a tensor's name for, to know whether it stays in float32; None if nothing stays so.

    Args:
        model: a transformers model, which has collected what the classes of its parts declare.
        dtype: the 16-bit dtype of the other tensors.

    Source: `_get_dtype_plan` in modeling_utils.py and `build_glob_alternation` in core_model_loading.py of
    transformers 5.24.0.
    """
    # `_keep_in_fp32_modules` guards against the small range of float16, so it does not apply to bfloat16.
    attributes = ["_keep_in_fp32_modules_strict", *(["_keep_in_fp32_modules"] if dtype == torch.float16 else [])]
    declared: list[Any] = [getattr(model, attribute, None) or () for attribute in attributes]
    patterns = sorted({pattern.replace("*", ".*") for names in declared for pattern in names})
    return re.compile("|".join(patterns)) if patterns else None
