"""Refusing quantized weights by what is stored, whatever the config says: bytes would be moved without their scales."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from plans.errors import UsageError
from runtime.checkpoint.extents import Form
from runtime.checkpoint.safetensors import StoredTensor

__all__ = ["check_dtypes", "check_names"]

_FLOATING = frozenset(("F64", "F32", "F16", "BF16"))
_PACKED = frozenset(("qweight", "qzeros", "g_idx", "weight_packed", "absmax", "quant_map", "nested_absmax"))
"""Last parts of names that only quantizers give."""
_SCALE = re.compile(r"(?P<scaled>.+?)(?:_scale\w*|_zero_point|\.(?:absmax|quant_state|SCB)\b.*)")
_HINT = "use the checkpoint's unquantized form"


def check_names(stored: Collection[str], of_model: Collection[str]) -> None:
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
                f"{name!r} belongs to a quantized weight; quantized checkpoints are not supported yet",
                hint=_HINT,
                tensor=name,
            )


def check_dtypes(forms: Mapping[str, Form], wanted: Mapping[str, str], tensors: Mapping[str, StoredTensor]) -> None:
    """Refuse stored tensors that are not floating-point where the model's parameter is.

    Args:
        forms: of the model's tensors over the stored ones.
        wanted: the dtypes that the model computes in, by name.
        tensors: the stored ones.

    Raises:
        UsageError: there is one.
    """
    for name, form in forms.items():
        for source in form.sources:
            dtype = tensors[source].dtype
            if wanted[name] in _FLOATING and dtype not in _FLOATING:
                raise UsageError(
                    f"{source!r} is stored as {dtype} where the model computes in {wanted[name]}; quantized "
                    "checkpoints are not supported yet",
                    hint=_HINT,
                    tensor=source,
                    dtype=dtype,
                )
