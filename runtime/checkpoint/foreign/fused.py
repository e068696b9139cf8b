"""Tensors that several matrices lie in, told by their names: whole cuts and cuts of each leave the same local shape."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from plans.placement import Packed, Shard
from plans.resolved import ResolvedParameter
from runtime.checkpoint.foreign.grouped import ExternalPlacement, UnevenPacked, external_placement_to_json

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = [
    "build_matrix_placement",
    "format_plan_hint",
    "infer_matrix_placement",
    "infer_matrix_sizes",
    "is_fused",
    "is_single_matrix",
]


def is_fused(name: str) -> bool:
    """Return whether a tensor's name, or its module's, is one that models give several matrices in one."""
    return any(fnmatchcase(part, pattern) for part in _get_last_parts(name) for pattern in _FUSED_NAMES)


def is_single_matrix(name: str) -> bool:
    """Return whether a tensor's name, or its module's, is one that models give a single matrix."""
    return not _SINGLE_MATRIX_NAMES.isdisjoint(_get_last_parts(name))


def infer_matrix_placement(row: ResolvedParameter, dim: int, config: PreTrainedConfig) -> ExternalPlacement | None:
    """Return how each matrix in a fused tensor would be cut, None where nothing tells how large they are.

    Args:
        row: of the tensor.
        dim: that is cut.
        config: of the language model.
    """
    if isinstance(row.placements[-1], Packed):
        return row.placements[-1]
    sizes = infer_matrix_sizes(row, dim, config)
    return build_matrix_placement(dim, sizes) if sizes else None


def build_matrix_placement(dim: int, sizes: tuple[int, ...]) -> ExternalPlacement:
    """Return how matrices of these sizes are cut, each by itself, where they lie one after the other along a dim."""
    return Packed(dim, len(sizes)) if len(set(sizes)) == 1 else UnevenPacked(dim, sizes)


def infer_matrix_sizes(row: ResolvedParameter, dim: int, config: PreTrainedConfig) -> tuple[int, ...]:
    """Return the sizes of the matrices in a fused tensor, nothing where the model does not tell.

    Args:
        row: of the tensor.
        dim: along which they lie.
        config: of the language model.
    """
    extent, parts = row.shape[dim], _get_last_parts(row.name)
    of_name = next(
        (of for pattern, of in _FUSED_NAMES.items() if any(fnmatchcase(part, pattern) for part in parts)), None
    )
    sizes = of_name(config, extent) if of_name else ()
    return sizes if sum(sizes) == extent else ()


def format_plan_hint(options: Mapping[str, tuple[int, ExternalPlacement | None]]) -> str:
    """Return the hint that gives entries of `--plan` for both readings of fused tensors.

    Args:
        options: for the key of each the dim that is cut, and how each matrix in it would be.
    """
    whole = {key: Shard(dim) for key, (dim, _) in options.items()}
    each = {key: placing for key, (_, placing) in options.items() if placing is not None}
    unsized = [dim for dim, placing in options.values() if placing is None]
    of_each = f"{_format_entries(each)} where each matrix in them was cut, as serving stacks do; " if each else ""
    sizes = f'; {{"packed": [{unsized[0]}, [SIZE, …]]}} is for matrices of these sizes' if unsized else ""
    return f"give --plan a JSON file that says {of_each}{_format_entries(whole)} where they were cut as one{sizes}"


def _format_entries(entries: Mapping[str, ExternalPlacement]) -> str:
    return json.dumps({key: external_placement_to_json(placing) for key, placing in entries.items()})


def _get_last_parts(name: str) -> list[str]:
    """Return the names of a tensor and of the module that holds it."""
    return name.split(".")[-2:]


def _compute_halves(config: PreTrainedConfig, extent: int) -> tuple[int, ...]:
    return (extent // 2, extent // 2)


def _compute_head_sizes(config: PreTrainedConfig, extent: int) -> tuple[int, ...]:
    """Return the sizes of queries, keys and values, which only heads of one width tell."""
    heads: int | None = getattr(config, "num_attention_heads", None)
    of_keys: int | None = getattr(config, "num_key_value_heads", None) or heads
    hidden: int | None = getattr(config, "hidden_size", None)
    if not heads or not of_keys or not hidden:
        return ()
    width = getattr(config, "head_dim", None) or hidden // heads
    return (heads * width, of_keys * width, of_keys * width)


_FUSED_NAMES: Mapping[str, Callable[[PreTrainedConfig, int], tuple[int, ...]] | None] = {
    "in_proj*": None,
    "*query_key_value*": None,
    "*qkvz*": None,
    "*qkv*": _compute_head_sizes,
    "c_attn": _compute_head_sizes,
    "*gate_up*": _compute_halves,
    "*up_gate*": _compute_halves,
    "*qk_proj": None,
    "kv_proj": None,
    "key_value*": None,
    "input_linear": None,
    "Wi": None,
    "conv1d": None,
}
"""Names of fused tensors, and the sizes of what lies in them where the config tells."""

_SINGLE_MATRIX_NAMES = frozenset(
    [
        *("lm_head", "embed_tokens", "embed_out"),
        *("q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "g_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    ]
)
"""Names of tensors that hold one matrix, of which every stack gives each rank a slice."""
