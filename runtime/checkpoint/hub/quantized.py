"""Refusing quantized weights that the config does not speak of: bytes would be moved without their scales."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from plans.errors import UsageError
from runtime.checkpoint.files.safetensors import StoredTensor
from runtime.tensor_map.tensor_map import TensorMap

__all__ = ["check_dtypes", "check_quantized", "check_scales", "check_unquantized"]

_FLOATING = frozenset(("F64", "F32", "F16", "BF16"))
_QUANTIZED = frozenset(("F8_E4M3", "F8_E5M2", "I8", "U8"))
_PACKED = frozenset(("qweight", "qzeros", "g_idx", "weight_packed", "absmax", "quant_map", "nested_absmax"))
"""Last parts of names that only quantizers give."""
_SCALE = re.compile(r"(?P<scaled>.+?)(?:_scale\w*|_zero_point|\.(?:absmax|quant_state|SCB)\b.*)")
_HINT = "use the checkpoint's unquantized form"


def check_unquantized(stored: Collection[str], of_model: Collection[str]) -> None:
    """Refuse stored tensors that are quantized weights, or scales of others.

    Args:
        stored: names in the checkpoint.
        of_model: names of the model's own tensors, which may be called anything.

    Raises:
        UsageError: there is one.
    """
    tensors = frozenset((*stored, *of_model))
    for name in stored:
        scale = _SCALE.fullmatch(name)
        if name not in of_model and (name.rpartition(".")[2] in _PACKED or (scale and scale["scaled"] in tensors)):
            raise UsageError(
                f"{name!r} belongs to a quantized weight; config.json speaks of no quantization",
                hint=_HINT,
                tensor=name,
            )


def check_quantized(tensors: Mapping[str, StoredTensor]) -> None:
    """Refuse a checkpoint that the config says is quantized and nothing of which is.

    Args:
        tensors: the stored ones.

    Raises:
        UsageError: none is of a dtype that quantizers store.
    """
    if not any(tensor.dtype in _QUANTIZED for tensor in tensors.values()):
        raise UsageError(
            "config.json has a quantization_config, but none of the stored tensors is quantized",
            hint="remove the entry if these are the unquantized weights",
        )


def check_scales(passthrough: Collection[str], stored: Collection[str]) -> None:
    """Refuse scales that the model has no place for although it has one for their weights.

    Args:
        passthrough: names of stored tensors that the model has no parameter for.
        stored: names in the checkpoint.

    Raises:
        UsageError: there is one.
    """
    alone = set(passthrough)
    for name in passthrough:
        scale = _SCALE.fullmatch(name)
        if scale and scale["scaled"] in stored and scale["scaled"] not in alone:
            raise UsageError(
                f"{name!r} scales {scale['scaled']!r}, which config.json's quantization_config leaves unquantized",
                hint=_HINT,
                tensor=name,
            )


def check_dtypes(
    tensor_maps: Mapping[str, TensorMap], wanted: Mapping[str, str], tensors: Mapping[str, StoredTensor]
) -> None:
    """Refuse stored tensors that are quantized where the model's parameter is not, and the other way round.

    Args:
        tensor_maps: of the model's tensors over the stored ones.
        wanted: the dtypes that the model has, by name.
        tensors: the stored ones.

    Raises:
        UsageError: there is one.
    """
    for name, form in tensor_maps.items():
        for source in form.sources:
            dtype = tensors[source].dtype
            if not _is_compatible(dtype, wanted[name]):
                raise UsageError(
                    f"{source!r} is stored as {dtype} where the model that config.json describes has {wanted[name]}",
                    hint=_HINT,
                    tensor=source,
                    dtype=dtype,
                )


def _is_compatible(dtype: str, wanted: str) -> bool:
    if wanted in _QUANTIZED:
        return dtype == wanted
    return wanted not in _FLOATING or dtype in _FLOATING
