"""Reading hub form: safetensors files as `save_pretrained` writes them, one file or several with an index."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from plans.errors import CheckpointError, ConversionError, HeaderError, IncompleteError, MismatchError
from plans.text import format_names
from runtime.checkpoint.checkpoint import Checkpoint, TensorInfo
from runtime.checkpoint.files.file_names import INDEX, MAX_INDEX, WEIGHTS, is_weight_file
from runtime.checkpoint.files.reading import convert_read_errors, is_nested_deeper, parse_strict_json
from runtime.checkpoint.files.safetensors import Header, StoredTensor, has_same_bytes, read_header
from runtime.checkpoint.files.side_files import LeftBehind, SideFiles, check_contained, find_side_files
from runtime.checkpoint.hub.conversion import Conversion, convert
from runtime.checkpoint.hub.quantized import check_dtypes, check_quantized, check_scales, check_unquantized
from runtime.checkpoint.hub.torch_saved import check_saved_whole, explain_mismatch
from runtime.checkpoint.manifest import StoredForm, build_index, pack_bytes
from runtime.checkpoint.near_names import build_missing_error
from runtime.formats import recognize_folder
from runtime.models.dtypes import dtype_name
from runtime.models.model import describe_assumed_class, find_tied_names, model_tensors, tensor_kind
from runtime.models.quantized import is_quantized
from runtime.tensor_map.tensor_map import Shape, TensorMap, whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["HubCheckpoint", "HubIndex", "check_has_weights", "read_hub", "read_hub_checkpoint"]


_MAX_DEPTH = 16


@dataclass(frozen=True)
class HubIndex:
    """An index file.

    Args:
        content: its content without the weight map.
        weight_map: the file of each tensor.
        text: the bytes of the file.
    """

    content: Mapping[str, object]
    weight_map: Mapping[str, str]
    text: bytes = field(repr=False)


@dataclass(frozen=True)
class HubCheckpoint:
    """A folder in hub form, its headers read and checked; no tensor has been read.

    Args:
        headers: the headers of the weight files, in the order of their names, without tensors left behind.
        tensors: all stored tensors by stored name.
        index: the index, None if there is none.
        side_files: the other files, such as config, tokenizer and licence.
    """

    headers: tuple[Header, ...]
    tensors: Mapping[str, StoredTensor]
    index: HubIndex | None
    side_files: SideFiles


def read_hub(folder: Path) -> HubCheckpoint:
    """Read the index and the headers of a folder in hub form.

    Like transformers, it prefers `model.safetensors` to an index. The index decides what the checkpoint consists of:
    files and tensors that it does not name are left behind, and so are weights in other formats.

    Raises:
        IncompleteError: a weight file is missing or truncated, the index names a tensor that its file lacks, or the
            folder is of another format.
        HeaderError: an index or header is damaged.
        CheckpointError: the folder does not exist, or a link leads out of it.
    """
    check_has_weights(folder)
    with convert_read_errors(folder):
        if os.path.lexists(folder / WEIGHTS):
            header = read_header(_resolve_path(folder, WEIGHTS))
            return HubCheckpoint((header,), header.tensors, None, find_side_files(folder, {WEIGHTS}))
        index = _read_index(folder)
        files = sorted(set(index.weight_map.values()))
        stored = {name: read_header(_resolve_path(folder, name)) for name in files}
        _check_index(folder / INDEX, index.weight_map, stored)
        headers = tuple(_select_named(header, index.weight_map) for header in stored.values())
        tensors = {name: tensor for header in headers for name, tensor in header.tensors.items()}
        side = find_side_files(folder, frozenset((*files, INDEX)))
        unnamed = (left for header in stored.values() for left in _list_unnamed(header, index.weight_map))
        side = SideFiles(side.copied, (*side.left_behind, *unnamed))
        return HubCheckpoint(headers, tensors, index, side)


def check_has_weights(folder: Path) -> None:
    """Refuse a folder without the weights of hub form, and say what it contains in their place.

    Raises:
        IncompleteError: the folder has neither `model.safetensors` nor an index.
        CheckpointError: it does not exist or cannot be read.
    """
    with convert_read_errors(folder):
        if not folder.is_dir():
            raise CheckpointError(
                f"{folder}: not a folder", hint="name the folder with config.json and the weights", folder=str(folder)
            )
        # A broken link is weights that are missing, which their reader says.
        if not any(os.path.lexists(folder / name) for name in (WEIGHTS, INDEX)):
            raise _no_weights_error(folder)


def _select_named(header: Header, weight_map: Mapping[str, str]) -> Header:
    """Return a header without the tensors that the index does not map to its file."""
    named = {name: tensor for name, tensor in header.tensors.items() if weight_map.get(name) == header.file.name}
    return header if len(named) == len(header.tensors) else replace(header, tensors=named, content=b"")


def _list_unnamed(header: Header, weight_map: Mapping[str, str]) -> Iterator[LeftBehind]:
    for name, tensor in header.tensors.items():
        mapped = weight_map.get(name)
        if mapped != header.file.name:
            reason = f"which {INDEX} maps to {mapped}" if mapped else f"which {INDEX} does not name"
            yield LeftBehind(f"{name!r} in {header.file.name}", reason, tensor.size, is_file=False)


def _read_index(folder: Path) -> HubIndex:
    path = _resolve_path(folder, INDEX)
    if path.stat().st_size > MAX_INDEX:
        raise HeaderError(
            f"{path}: larger than {MAX_INDEX} bytes", hint="the index is damaged; save it again", file=str(path)
        )
    text = path.read_bytes()
    content = parse_strict_json(text, path)
    match content.pop("weight_map", None):
        case dict(weight_map) if weight_map and all(isinstance(name, str) for name in weight_map.values()):
            pass
        case _:
            raise HeaderError(
                f"{path}: no weight_map from tensors to files", hint="download the index again", file=str(path)
            )
    for tensor, name in weight_map.items():
        if not is_weight_file(name):
            raise HeaderError(
                f"{path}: maps tensor {tensor!r} to {name!r}, which is not a safetensors file of this folder",
                hint="an index may only name files in its own folder; do not trust this checkpoint",
                tensor=tensor,
                file=name,
            )
    if is_nested_deeper(content, _MAX_DEPTH):
        raise HeaderError(
            f"{path}: nested more than {_MAX_DEPTH} deep",
            hint="the index is damaged; download it again",
            file=str(path),
        )
    return HubIndex(content, weight_map, text)


def _resolve_path(folder: Path, name: str) -> Path:
    """Return the file's path. A link may lead only into the folder itself or to the hub cache's blobs."""
    path = folder / name
    if path.is_symlink():
        check_contained(folder, path)
    if not path.is_file():
        raise IncompleteError(
            f"{path}: missing, though {INDEX} names it", hint="download or copy the missing file", file=str(path)
        )
    return path


def _check_index(index: Path, weight_map: Mapping[str, str], headers: Mapping[str, Header]) -> None:
    """Refuse an index that maps a tensor to a file without it."""
    for name, file in weight_map.items():
        if name in headers[file].tensors:
            continue
        if others := [other for other, header in headers.items() if name in header.tensors]:
            raise HeaderError(
                f"{index}: maps tensor {name!r} to {file}, but it is in {others[0]}",
                hint="the index belongs to another version of the checkpoint; download both again",
                tensor=name,
            )
        raise IncompleteError(
            f"{index}: tensor {name!r} is not in {file}", hint="download the file again", tensor=name, file=file
        )


def _no_weights_error(folder: Path) -> CheckpointError:
    """Return the error for a folder without weights in hub form, with what it contains in their place."""
    if (recognized := recognize_folder(folder)) is not None:
        return recognized.build_error(folder)
    names = sorted(path.name for path in folder.iterdir())
    return IncompleteError(
        f"{folder}: no {WEIGHTS} or {INDEX}, " + (f"only {format_names(names)}" if names else "the folder is empty"),
        hint="name the folder with the weights",
        folder=str(folder),
        files=names,
    )


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
    hub = read_hub(folder)
    check_saved_whole(folder, hub.headers, hub.index.content if hub.index else None)
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
    return Checkpoint(
        folder=folder,
        layout="hf",
        tensors={**tensors, **passthrough},
        tied=tied,
        tensor_maps={
            **conversion.tensor_maps,
            **{name: whole(name, hub.tensors[name].shape) for name in conversion.passthrough},
            **conversion.dropped,
        },
        chunks=hub.tensors,
        side_files=hub.side_files,
        stored_form=_build_stored_form(hub),
    )


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
        own, target = (_get_whole_tensor(form, hub) for form in (tensor_map, conversion.tensor_maps[tied[name]]))
        if own is None or target is None or not has_same_bytes(own, target):
            raise ConversionError(
                f"{name} is tied to {tied[name]} but stored with other values",
                hint="set tie_word_embeddings to false in config.json, or save the model again with its weights tied",
                name=name,
                tied_to=tied[name],
            )


def _get_whole_tensor(tensor_map: TensorMap, hub: HubCheckpoint) -> StoredTensor | None:
    """Return the stored tensor that the map covers, None unless it is a single one, whole and in order."""
    tensors = [hub.tensors[source] for source in tensor_map.sources]
    return tensors[0] if len(tensors) == 1 and tensor_map == whole(tensor_map.sources[0], tensors[0].shape) else None


def _build_tensor_info(name: str, tensor_map: TensorMap, tensor: torch.Tensor, hub: HubCheckpoint) -> TensorInfo:
    """Return the info of a model's tensor with the dtype that it is stored in; bytes are copied, never cast."""
    dtypes = {hub.tensors[source].dtype: source for source in tensor_map.sources}
    if len(dtypes) > 1:
        listed = " and ".join(f"{source} ({dtype})" for dtype, source in sorted(dtypes.items()))
        raise ConversionError(f"{name} would mix dtypes: {listed}", hint="save the checkpoint in one dtype", name=name)
    dtype = next(iter(dtypes), dtype_name(tensor.dtype))
    return TensorInfo(tensor_kind(tensor), dtype, tensor_map.shape)


def _build_passthrough(hub: HubCheckpoint, conversion: Conversion) -> Mapping[str, TensorInfo]:
    for name in conversion.passthrough:
        if name in conversion.tensor_maps:
            raise ConversionError(
                f"{name} is stored under its own name and also made from other tensors",
                hint="save the checkpoint again with transformers",
                name=name,
            )
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
