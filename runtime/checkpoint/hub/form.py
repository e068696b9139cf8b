"""The hub form that a model is saved in where nothing is known of an earlier one: transformers' own names and files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import torch

from plans.errors import ConversionError
from runtime.checkpoint.content import Checkpoint, TensorInfo
from runtime.checkpoint.files.safetensors import BITS, tensor_bytes
from runtime.checkpoint.record import StoredForm
from runtime.models.dtypes import DTYPE_NAMES, DTYPES
from runtime.wording import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Experts", "build_default_form"]

Experts = Literal["fused", "separate"]
"""Whether experts are stored stacked as the model holds them, or each by itself where its hub form has them so."""

_FILE_PATTERN = "model{suffix}.safetensors"
_MAX_FILE_SIZE = "50GB"
"""What `save_pretrained` puts into one file, transformers 5.23."""


def build_default_form(checkpoint: Checkpoint, model: PreTrainedModel, experts: Experts = "separate") -> StoredForm:
    """Return the form in which `save_pretrained` would store a checkpoint's tensors.

    Args:
        checkpoint: of a checkpoint of the model.
        model: on meta.
        experts: `fused` leaves every tensor as the model holds it.

    Raises:
        ConversionError: transformers cannot bring the model's tensors to their hub form, or torch lacks a dtype.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    state = {name: _make_meta_tensor(name, held) for name, held in checkpoint.tensors.items() if held.kind != "carried"}
    reverted = _revert_conversion(model, state) if experts == "separate" else state
    carried = {name: held for name, held in checkpoint.tensors.items() if held.kind == "carried"}
    split = split_torch_state_dict_into_shards(
        {**reverted, **{name: _make_bytes_tensor(held) for name, held in carried.items()}},
        filename_pattern=_FILE_PATTERN,
        max_shard_size=_MAX_FILE_SIZE,
    )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    index = {"metadata": {"total_parameters": parameters, **split.metadata}} if split.is_sharded else None
    stored = {name: (DTYPE_NAMES[tensor.dtype], list(tensor.shape)) for name, tensor in reverted.items()}
    stored |= {name: (held.dtype, list(held.shape)) for name, held in carried.items()}
    tensors = {
        name: {"file": file, "dtype": stored[name][0], "shape": stored[name][1]}
        for file, names in split.filename_to_tensors.items()
        for name in sorted(names, key=lambda one: (-BITS[stored[one][0]], one))
    }
    return StoredForm(tuple(split.filename_to_tensors), {"format": "pt"}, {}, index, tensors)


def _make_meta_tensor(name: str, info: TensorInfo) -> torch.Tensor:
    if info.dtype not in DTYPES:
        raise ConversionError(f"{name} is {info.dtype}, which torch lacks", hint="use a newer torch", name=name)
    return torch.empty(info.shape, dtype=DTYPES[info.dtype], device="meta")


def _make_bytes_tensor(info: TensorInfo) -> torch.Tensor:
    """Return something of as many bytes as a tensor that is carried, which may be one that torch cannot have."""
    return torch.empty(tensor_bytes(info.dtype, info.shape), dtype=torch.uint8, device="meta")


def _revert_conversion(model: PreTrainedModel, state: dict[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """Return the tensors as transformers' own reverse conversion leaves them, on meta."""
    from transformers.core_model_loading import revert_weight_conversion

    try:
        reverted: dict[str, torch.Tensor] = revert_weight_conversion(model, state)
    except Exception as error:  # What transformers' conversions raise is not ours to list.
        raise ConversionError(
            f"transformers cannot bring {type(model).__name__} to its hub form: {first_line(error)}",
            hint="give --experts fused to store its tensors as the model holds them",
            model=type(model).__name__,
        ) from error
    return reverted
