"""Reading hub form: the files as `save_pretrained` writes them, converted to the tensors of a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from plans.errors import CheckpointError, ConversionError, IncompleteError, MismatchError
from runtime.checkpoint.checkpoint import Checkpoint, TensorInfo
from runtime.checkpoint.files.file_names import INDEX
from runtime.checkpoint.files.safetensors import has_same_bytes
from runtime.checkpoint.hub.conversion import Conversion, convert, find_model_names
from runtime.checkpoint.hub.files import HubCheckpoint, find_pickled_weights, read_hub
from runtime.checkpoint.hub.pickled import read_pickled_hub
from runtime.checkpoint.hub.quantized import check_dtypes, check_quantized, check_scales, check_unquantized
from runtime.checkpoint.hub.torch_saved import check_saved_whole, explain_mismatch
from runtime.checkpoint.manifest import StoredForm, build_index, pack_bytes
from runtime.checkpoint.near_names import build_missing_error, check_distinct, strip_wrappers
from runtime.models.dtypes import dtype_name
from runtime.models.model import describe_assumed_class, find_tied_names, model_tensors, tensor_kind
from runtime.models.quantized import is_quantized
from runtime.tensor_map.compose import compose
from runtime.tensor_map.tensor_map import Shape, TensorMap, whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["read_hub_checkpoint"]


def read_hub_checkpoint(folder: Path, model: PreTrainedModel) -> Checkpoint:
    """Read a checkpoint in hub form up to its headers, its tensors converted as transformers converts them on loading.

    Args:
        folder: the checkpoint's folder.
        model: the model that its config describes, on meta.

    Raises:
        HeaderError: an index or header is damaged.
        CheckpointError: the folder cannot be read, or a link leads out of it.
        ConversionError: known operations do not make the model's tensors from the stored ones, a tensor would mix
            dtypes, or a tied name is stored with other values than its target.
        IncompleteError: a tensor of the model is not stored, or torch lost rows when it saved the checkpoint.
        MismatchError: the stored shapes are not the model's.
        UsageError: stored tensors are quantized where the model's are not, or the other way round.
    """
    pickled = find_pickled_weights(folder)
    hub = read_hub(folder) if pickled is None else read_pickled_hub(folder, pickled)
    check_saved_whole(folder, hub.headers, hub.index.content if hub.index else None)
    hub = _strip_wrappers(folder, hub, model)
    tied = find_tied_names(model)
    of_model = model_tensors(model)
    shapes = {name: tuple(tensor.shape) for name, tensor in of_model.items() if name not in tied}
    try:
        conversion = _convert(folder, model, hub, shapes, tied)
    except (CheckpointError, MismatchError) as error:
        if "operation" not in error.data:  # quantized weights explain best why tensors are missing or have other shapes
            _check_quantization(hub, model, of_model)
        if isinstance(error, MismatchError) and (lossy := explain_mismatch(folder, error)) is not None:
            raise lossy from error
        raise
    _check_quantization(hub, model, of_model)
    check_dtypes(conversion.tensor_maps, {name: dtype_name(of_model[name].dtype) for name in shapes}, hub.tensors)
    check_scales(conversion.passthrough, hub.tensors.keys())
    _check_duplicates(hub, conversion, tied)
    tensors = {
        name: _build_tensor_info(name, tensor_map, of_model[name], hub)
        for name, tensor_map in conversion.tensor_maps.items()
    }
    passthrough = _build_passthrough(hub, conversion)
    tensor_maps = {
        **conversion.tensor_maps,
        **{name: whole(name, hub.tensors[name].shape) for name in conversion.passthrough},
        **conversion.dropped,
    }
    return Checkpoint(
        folder=folder,
        layout="hf",
        tensors={**tensors, **passthrough},
        tied=tied,
        tensor_maps=_map_to_storages(tensor_maps, hub) if hub.views else tensor_maps,
        chunks={**{name: tensor for name, tensor in hub.tensors.items() if name not in hub.views}, **hub.storages},
        side_files=hub.side_files,
        find_stored_form=cache(lambda: _build_stored_form(hub) if hub.headers else None),
        reoriented=conversion.reoriented,
    )


def _strip_wrappers(folder: Path, hub: HubCheckpoint, model: PreTrainedModel) -> HubCheckpoint:
    """Return the tensors without what wrappers put into their names, if that makes more of the model's of them.

    Nothing of their form is kept then: the way back to hub form gives the names without wrappers.
    """
    bare = {name: strip_wrappers(name) for name in hub.tensors}
    if all(bare[name] == name for name in bare):
        return hub
    check_distinct(folder, bare)
    if len(find_model_names(model, bare.values())) > len(find_model_names(model, bare)):
        tensors = {bare[name]: tensor for name, tensor in hub.tensors.items()}
        views = {bare[name]: view for name, view in hub.views.items()}
        return replace(hub, headers=(), tensors=tensors, views=views)
    return hub


def _map_to_storages(tensor_maps: Mapping[str, TensorMap], hub: HubCheckpoint) -> dict[str, TensorMap]:
    """Return the tensor maps with what views show of their storages in place of the views."""
    identity = {name: whole(name, tensor.shape) for name, tensor in hub.tensors.items()}
    over_storages = compose({**identity, **hub.views})
    return {name: over_storages(tensor_map) for name, tensor_map in tensor_maps.items()}


def _check_quantization(hub: HubCheckpoint, model: PreTrainedModel, of_model: Mapping[str, torch.Tensor]) -> None:
    if is_quantized(model):
        check_quantized(hub.tensors)
    else:
        check_unquantized(hub.tensors.keys(), of_model.keys())


def _convert(
    folder: Path, model: PreTrainedModel, hub: HubCheckpoint, shapes: Mapping[str, Shape], tied: Mapping[str, str]
) -> Conversion:
    """Convert the stored tensors, and where some of the model's are missing, say what is stored in their place."""
    try:
        return convert(model, {name: tensor.shape for name, tensor in hub.tensors.items()}, shapes, tied)
    except IncompleteError as error:
        missing = error.data.get("missing")
        if not isinstance(missing, list) or not shapes.keys() >= set(missing):
            raise
        unnamed = [
            str(left) for left in hub.side_files.left_behind if any(f"{name!r} in" in left.name for name in missing)
        ]
        note = "; ".join(filter(None, (*unnamed, describe_assumed_class(model))))
        raise build_missing_error(folder, missing, shapes, hub.tensors, note=note) from error


def _check_duplicates(hub: HubCheckpoint, conversion: Conversion, tied: Mapping[str, str]) -> None:
    """Refuse a tied name that is stored although its target is, unless both have the same bytes."""
    for name, tensor_map in conversion.duplicates.items():
        own, target = (_find_whole_tensor(form, hub) for form in (tensor_map, conversion.tensor_maps[tied[name]]))
        if own is None or target is None or not _has_same_values(own, target, hub):
            raise ConversionError(
                f"{name} is tied to {tied[name]} but stored with other values",
                hint="set tie_word_embeddings to false in config.json, or save the model again with its weights tied",
                name=name,
                tied_to=tied[name],
            )


def _find_whole_tensor(tensor_map: TensorMap, hub: HubCheckpoint) -> str | None:
    """Return the name of the stored tensor that the map covers, None unless it is a single one, whole and in order."""
    if len(tensor_map.sources) != 1:
        return None
    (name,) = tensor_map.sources
    return name if tensor_map == whole(name, hub.tensors[name].shape) else None


def _has_same_values(first: str, second: str, hub: HubCheckpoint) -> bool:
    """Return whether two stored tensors are equal bit for bit; of views, only those that are alike can be."""
    views = hub.views.get(first), hub.views.get(second)
    match views:
        case (None, None):
            return has_same_bytes(hub.tensors[first], hub.tensors[second])
        case (TensorMap() as one, TensorMap() as other):
            alike = [[box._replace(source="") for box in view.boxes] for view in (one, other)]
            return alike[0] == alike[1] and has_same_bytes(*(hub.storages[view.sources[0]] for view in (one, other)))
    return False


def _build_tensor_info(name: str, tensor_map: TensorMap, tensor: torch.Tensor, hub: HubCheckpoint) -> TensorInfo:
    """Return the info of a model's tensor with the dtype that it is stored in; bytes are copied, never cast."""
    dtypes = {hub.tensors[source].dtype: source for source in tensor_map.sources}
    if len(dtypes) > 1:
        listed = " and ".join(f"{source} ({dtype})" for dtype, source in sorted(dtypes.items()))
        raise ConversionError(f"{name} would mix dtypes: {listed}", hint="save the checkpoint in one dtype", name=name)
    dtype = next(iter(dtypes), dtype_name(tensor.dtype))
    return TensorInfo(tensor_kind(tensor), dtype, tensor_map.shape)


def _build_passthrough(hub: HubCheckpoint, conversion: Conversion) -> Mapping[str, TensorInfo]:
    passthrough = {
        name: TensorInfo("carried", hub.tensors[name].dtype, hub.tensors[name].shape) for name in conversion.passthrough
    }
    dropped = {
        name: TensorInfo("carried", hub.tensors[tensor_map.sources[0]].dtype, tensor_map.shape)
        for name, tensor_map in conversion.dropped.items()
    }
    return {**passthrough, **dropped}


def _build_stored_form(hub: HubCheckpoint) -> StoredForm:
    common = hub.headers[0].metadata
    form = StoredForm(
        files=tuple(header.file.name for header in hub.headers),
        metadata=common,
        file_metadata={h.file.name: h.metadata for h in hub.headers if h.metadata != common},
        index=hub.index.content if hub.index else None,
        tensors={
            name: {"file": tensor.file.name, "dtype": tensor.dtype, "shape": list(tensor.shape)}
            for name, tensor in hub.tensors.items()
        },
    )
    # Headers and indexes as safetensors and save_pretrained write them are made again from the rest of the form.
    verbatim = {h.file.name: pack_bytes(h.content) for h in hub.headers if h.content and not h.is_canonical}
    if hub.index is not None and hub.index.text != build_index(form):
        verbatim[INDEX] = pack_bytes(hub.index.text)
    return replace(form, verbatim=verbatim)
