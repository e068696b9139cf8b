"""What a checkpoint in hub form holds of a model: stored tensors renamed, merged and cut as transformers loads them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from plans.errors import ConversionError
from runtime.checkpoint.checkpoint import Checkpoint, TensorInfo
from runtime.checkpoint.files.safetensors import StoredTensor
from runtime.checkpoint.files.same_bytes import has_same_bytes
from runtime.checkpoint.hub.conversion import Conversion, convert
from runtime.checkpoint.hub.folder import HubCheckpoint
from runtime.checkpoint.hub.quantized import check_dtypes, check_quantized, check_scales, check_unquantized
from runtime.checkpoint.record import StoredForm
from runtime.models.dtypes import dtype_name
from runtime.models.model import find_tied_names, model_tensors, tensor_kind
from runtime.models.quantized import is_quantized
from runtime.tensor_map.tensor_map import TensorMap, whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["build_hub_checkpoint", "check_duplicates"]


def check_duplicates(hub: HubCheckpoint, conversion: Conversion, tied: Mapping[str, str]) -> None:
    """Refuse a tied name that is stored besides its target, unless it holds the same bytes.

    Args:
        hub: the checkpoint.
        conversion: of its tensors to the model's.
        tied: each tied name with the name that holds the bytes.

    Raises:
        ConversionError: the two differ.
    """
    for name, form in conversion.duplicates.items():
        own, other = _get_whole_tensor(form, hub), _get_whole_tensor(conversion.tensor_maps[tied[name]], hub)
        if own is not None and other is not None and has_same_bytes(own, other):
            continue
        raise ConversionError(
            f"{name} is tied to {tied[name]} but stored with other values",
            hint="set tie_word_embeddings to false in config.json, or remove one of the two",
            name=name,
            tied_to=tied[name],
        )


def _get_whole_tensor(tensor_map: TensorMap, hub: HubCheckpoint) -> StoredTensor | None:
    """Return the stored tensor that a form is, if it is one and all of it."""
    tensors = [hub.tensors[source] for source in tensor_map.sources]
    return tensors[0] if len(tensors) == 1 and tensor_map == whole(tensor_map.sources[0], tensors[0].shape) else None


def build_hub_checkpoint(hub: HubCheckpoint, model: PreTrainedModel) -> Checkpoint:
    """Return what a hub-form checkpoint holds of a model.

    Args:
        hub: the checkpoint.
        model: that its config describes, on meta.

    Raises:
        ConversionError: stored tensors do not make the model's by operations that are known, or mix dtypes.
        IncompleteError: a tensor of the model is stored nowhere.
        MismatchError: stored shapes are not the model's.
        UsageError: stored tensors are quantized otherwise than the model's.
    """
    tied = find_tied_names(model)
    of_model = model_tensors(model)
    if is_quantized(model):
        check_quantized(hub.tensors)
    else:
        check_unquantized(hub.tensors.keys(), of_model.keys())
    shapes = {name: tuple(tensor.shape) for name, tensor in of_model.items() if name not in tied}
    conversion = convert(model, {name: tensor.shape for name, tensor in hub.tensors.items()}, shapes, tied)
    check_dtypes(conversion.tensor_maps, {name: dtype_name(of_model[name].dtype) for name in shapes}, hub.tensors)
    check_scales(conversion.passthrough, hub.tensors.keys())
    check_duplicates(hub, conversion, tied)
    tensors = {
        name: _build_tensor_info(name, form, of_model[name], hub) for name, form in conversion.tensor_maps.items()
    }
    carried = _build_passthrough(hub, conversion)
    return Checkpoint(
        folder=hub.folder,
        layout="hf",
        tensors={**tensors, **carried},
        tied=tied,
        tensor_maps={**conversion.tensor_maps, **{name: whole(name, held.shape) for name, held in carried.items()}},
        chunks=hub.tensors,
        side_files=hub.side_files,
        stored_form=_build_stored_form(hub),
    )


def _build_tensor_info(name: str, tensor_map: TensorMap, tensor: torch.Tensor, hub: HubCheckpoint) -> TensorInfo:
    """Return a tensor of the model in the dtype that it is stored in; bytes are moved, never cast."""
    dtypes = {hub.tensors[source].dtype: source for source in tensor_map.sources}
    if len(dtypes) > 1:
        listed = " and ".join(f"{source} ({dtype})" for dtype, source in sorted(dtypes.items()))
        raise ConversionError(f"{name} would mix dtypes: {listed}", hint="save the checkpoint in one dtype", name=name)
    dtype = next(iter(dtypes), dtype_name(tensor.dtype))
    return TensorInfo(tensor_kind(tensor), dtype, tensor_map.shape)


def _build_passthrough(hub: HubCheckpoint, conversion: Conversion) -> Mapping[str, TensorInfo]:
    for name in conversion.passthrough:
        if name in conversion.tensor_maps:
            what = f"{name} is both stored for itself and made from others"
            raise ConversionError(what, hint="save it again", name=name)
    return {
        name: TensorInfo("carried", hub.tensors[name].dtype, hub.tensors[name].shape) for name in conversion.passthrough
    }


def _build_stored_form(hub: HubCheckpoint) -> StoredForm:
    common = hub.headers[0].metadata
    return StoredForm(
        files=tuple(header.file.name for header in hub.headers),
        metadata=common,
        file_metadata={h.file.name: h.metadata for h in hub.headers if h.metadata != common},
        index=hub.index,
        tensors={
            name: {"file": tensor.file.name, "dtype": tensor.dtype, "shape": list(tensor.shape)}
            for name, tensor in hub.tensors.items()
        },
    )
