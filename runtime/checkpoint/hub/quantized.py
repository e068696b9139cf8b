"""Refusing weights that are quantized where the config says otherwise: they would be separated from their scales."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from plans.errors import UsageError
from runtime.checkpoint.files.safetensors import StoredTensor
from runtime.formats import find_tensor_format
from runtime.tensor_map.tensor_map import TensorMap

__all__ = ["check_dtypes", "check_quantized", "check_scales", "check_unquantized"]

_FLOATING = frozenset(("F64", "F32", "F16", "BF16"))
_QUANTIZED = frozenset(("F8_E4M3", "F8_E5M2", "I8", "U8"))
_PACKED = frozenset(("qweight", "qzeros", "g_idx", "weight_packed", "absmax", "quant_map", "nested_absmax"))
"""Last parts of names that only quantizers use."""
_SCALE = re.compile(r"(?P<scaled>.+?)(?:_scale\w*|_zero_point|\.(?:absmax|quant_state|SCB)\b.*)")
_HINT = "use the checkpoint that it was quantized from, or the config.json that was saved with these weights"


def check_unquantized(stored: Collection[str], of_model: Collection[str]) -> None:
    """Refuse quantized weights and their scales in the checkpoint of an unquantized model.

    Args:
        stored: the names of the stored tensors.
        of_model: the names of the model's own tensors, which are never taken for scales.

    Raises:
        UsageError: a stored tensor is a quantized weight or a scale.
    """
    tensors = frozenset((*stored, *of_model))
    for name in stored:
        scale = _SCALE.fullmatch(name)
        if name not in of_model and (name.rpartition(".")[2] in _PACKED or (scale and scale["scaled"] in tensors)):
            row = find_tensor_format(name)
            what = f"a quantized weight ({row.name})" if row else "a quantized weight"
            raise UsageError(
                f"{name!r} belongs to {what}, but config.json has no quantization_config",
                hint=row.step if row else _HINT,
                tensor=name,
            )


def check_quantized(tensors: Mapping[str, StoredTensor]) -> None:
    """Refuse a checkpoint that is quantized according to its config but stores no quantized tensor.

    Args:
        tensors: the stored tensors by name.

    Raises:
        UsageError: no tensor has a dtype of quantized weights.
    """
    if not any(tensor.dtype in _QUANTIZED for tensor in tensors.values()):
        raise UsageError(
            "config.json has a quantization_config, but none of the stored tensors is quantized",
            hint="take the quantization_config out of config.json if these are the unquantized weights",
        )


def check_scales(passthrough: Collection[str], stored: Collection[str]) -> None:
    """Refuse scales that the model has no parameter for although it has one for their weights.

    Args:
        passthrough: the names of the stored tensors that the model has no parameter for.
        stored: the names of all stored tensors.

    Raises:
        UsageError: there is such a scale.
    """
    unknown = set(passthrough)
    for name in passthrough:
        scale = _SCALE.fullmatch(name)
        if scale and scale["scaled"] in stored and scale["scaled"] not in unknown:
            raise UsageError(
                f"{name!r} scales {scale['scaled']!r}, which config.json's quantization_config leaves unquantized",
                hint=_HINT,
                tensor=name,
            )


def check_dtypes(
    tensor_maps: Mapping[str, TensorMap], wanted: Mapping[str, str], tensors: Mapping[str, StoredTensor]
) -> None:
    """Refuse stored tensors that are quantized where the model's parameters are not, or the other way round.

    Args:
        tensor_maps: the model's tensors over the stored ones.
        wanted: the model's dtypes by name.
        tensors: the stored tensors by name.

    Raises:
        UsageError: there is such a tensor.
    """
    for name, tensor_map in tensor_maps.items():
        for source in tensor_map.sources:
            dtype = tensors[source].dtype
            if not _is_compatible(dtype, wanted[name]):
                raise UsageError(
                    f"{source!r} is stored as {dtype}, but {wanted[name]} in the model that config.json describes",
                    hint=_HINT,
                    tensor=source,
                    dtype=dtype,
                )


def _is_compatible(dtype: str, wanted: str) -> bool:
    if wanted in _QUANTIZED:
        return dtype == wanted
    return wanted not in _FLOATING or dtype in _FLOATING
