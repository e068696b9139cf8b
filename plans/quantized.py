"""Quantized weights: which entries of a plan belong to the scales, blocks and zero points of another entry's weight."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

__all__ = ["find_weight_key", "is_whole_style", "iter_scale_keys"]

_FILE = Path(__file__).with_name("quantized.toml")
_MODULE_OF_PARAMETER = re.compile(r"(?:.*\.)?experts\.(?:gate_up_proj|up_proj|down_proj)")


@cache
def find_weight_key(key: str) -> str | None:
    """Return the key of the weight that a quantizer's tensor belongs to, None for any other key.

    `experts.gate_up_proj_scale_inv` belongs to the parameter `experts.gate_up_proj`, and so does
    `experts.gate_up_proj.weight_scale_inv`; `q_proj.weight_scale` belongs to `q_proj.weight`.
    """
    module, _, name = key.rpartition(".")
    tensors = _load()
    if name in tensors["beside_weight"]:
        return _name_weight(module, "weight") if module else None
    suffix = next(filter(key.endswith, tensors["suffixes"]), "")
    module, _, name = key.removesuffix(suffix).rpartition(".")
    return _name_weight(module, name) if suffix and name else None


def iter_scale_keys(keys: Iterable[str], weight: str) -> Iterator[str]:
    """Yield those keys that name a quantizer's tensors of a weight."""
    return (key for key in keys if find_weight_key(key) == weight)


def is_whole_style(style: str) -> bool:
    """Return whether a style leaves a parameter whole."""
    return style in _load()["whole_styles"]


def _name_weight(module: str, name: str) -> str:
    """Return the key of a weight; an experts' parameter is no module, whatever its scales' keys look like."""
    if name == "weight" and _MODULE_OF_PARAMETER.fullmatch(module):
        return module
    return f"{module}.{name}" if module else name


@cache
def _load() -> dict[str, list[str]]:
    return tomllib.loads(_FILE.read_text("utf-8"))
