"""Reading hub form: safetensors files as `save_pretrained` writes them, one file or several with an index."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from plans.errors import CheckpointError, ConversionError, HeaderError, IncompleteError
from runtime.checkpoint.checkpoint import Checkpoint, TensorInfo
from runtime.checkpoint.files.file_names import INDEX, MANIFEST, WEIGHTS, is_weight_file
from runtime.checkpoint.files.reading import convert_read_errors, is_nested_deeper, parse_strict_json
from runtime.checkpoint.files.safetensors import Header, StoredTensor, has_same_bytes, read_header
from runtime.checkpoint.files.side_files import WEIGHT_SUFFIXES, SideFiles, check_contained, find_side_files
from runtime.checkpoint.hub.conversion import Conversion, convert
from runtime.checkpoint.hub.quantized import check_dtypes, check_quantized, check_scales, check_unquantized
from runtime.checkpoint.manifest import StoredForm
from runtime.models.dtypes import dtype_name
from runtime.models.model import find_tied_names, model_tensors, tensor_kind
from runtime.models.quantized import is_quantized
from runtime.tensor_map.tensor_map import TensorMap, whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["HubCheckpoint", "read_hub", "read_hub_checkpoint"]


_MAX_INDEX = 100_000_000
_MAX_DEPTH = 16


@dataclass(frozen=True)
class HubCheckpoint:
    """A folder in hub form, its headers read and checked; no tensor has been read.

    Args:
        headers: the headers of the weight files, in the order of their names.
        tensors: all stored tensors by stored name.
        index: the index file's content without its weight map, None if there is no index.
        side_files: the other files, such as config, tokenizer and licence.
    """

    headers: tuple[Header, ...]
    tensors: Mapping[str, StoredTensor]
    index: Mapping[str, object] | None
    side_files: SideFiles


def read_hub(folder: Path) -> HubCheckpoint:
    """Read the index and the headers of a folder in hub form.

    Like transformers, it prefers `model.safetensors` to an index. Weights in other formats and weight files that the
    index does not name are not part of the checkpoint.

    Raises:
        IncompleteError: a weight file is missing or truncated.
        HeaderError: an index or header is damaged or contradicts the files.
        CheckpointError: the folder does not exist, or a link leads out of it.
    """
    with convert_read_errors(folder):
        if not folder.is_dir():
            raise CheckpointError(
                f"{folder}: not a folder", hint="name the folder with config.json and the weights", folder=str(folder)
            )
        if (folder / WEIGHTS).exists():
            return _read_files(folder, [WEIGHTS], None)
        if not (folder / INDEX).exists():
            raise _no_weights_error(folder)
        extra, weight_map = _read_index(folder)
        checkpoint = _read_files(folder, sorted(set(weight_map.values())), extra)
        _check_index(folder / INDEX, weight_map, checkpoint.tensors)
        return checkpoint


def _read_files(folder: Path, files: Sequence[str], index: Mapping[str, object] | None) -> HubCheckpoint:
    headers = tuple(read_header(_resolve_path(folder, name)) for name in files)
    used = frozenset(files) if index is None else frozenset((*files, INDEX))
    return HubCheckpoint(headers, _merge_headers(headers), index, find_side_files(folder, used))


def _read_index(folder: Path) -> tuple[dict[str, object], dict[str, str]]:
    path = _resolve_path(folder, INDEX)
    if path.stat().st_size > _MAX_INDEX:
        raise HeaderError(
            f"{path}: larger than {_MAX_INDEX} bytes", hint="the index is damaged; save it again", file=str(path)
        )
    content = parse_strict_json(path.read_bytes(), path)
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
    return content, weight_map


def _resolve_path(folder: Path, name: str) -> Path:
    """Return the file's path. A link may lead only into the folder itself or to the hub cache's blobs."""
    path = folder / name
    if not path.is_file():
        raise IncompleteError(
            f"{path}: missing, though {INDEX} names it", hint="download or copy the missing file", file=str(path)
        )
    check_contained(folder, path)
    return path


def _merge_headers(headers: tuple[Header, ...]) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for header in headers:
        for name, tensor in header.tensors.items():
            if name in tensors:
                raise HeaderError(
                    f"tensor {name!r} is both in {tensors[name].file} and in {tensor.file}",
                    hint="remove the file that does not belong to this checkpoint",
                    tensor=name,
                )
            tensors[name] = tensor
    return tensors


def _check_index(index: Path, weight_map: Mapping[str, str], tensors: Mapping[str, StoredTensor]) -> None:
    for name, file in weight_map.items():
        if name not in tensors:
            raise IncompleteError(
                f"{index}: tensor {name!r} is not in {file}", hint="download the file again", tensor=name, file=file
            )
        if tensors[name].file.name != file:
            raise HeaderError(
                f"{index}: maps tensor {name!r} to {file}, but it is in {tensors[name].file.name}",
                hint="the index belongs to another version of the checkpoint; download both again",
                tensor=name,
            )
    for name, tensor in tensors.items():
        if name not in weight_map:
            raise HeaderError(
                f"{index}: does not name tensor {name!r} in {tensor.file.name}",
                hint="the index belongs to another version of the checkpoint; download both again",
                tensor=name,
            )


def _no_weights_error(folder: Path) -> CheckpointError:
    """Return the error for a folder of no known layout, with a hint for the first file that looks like weights."""
    files = sorted(path.name for path in folder.iterdir())
    for matches, missing, hint in _NEAR_MISSES:
        if weights := [name for name in files if matches(name)]:
            return IncompleteError(f"{folder}: has {weights[0]}, but no {missing}", hint=hint, files=weights)
    return IncompleteError(
        f"{folder}: no {WEIGHTS} or {INDEX}", hint="name the folder with the weights", folder=str(folder)
    )


_NEAR_MISSES: Sequence[tuple[Callable[[str], bool], str, str]] = (
    (
        lambda name: name.endswith(".distcp"),
        ".metadata, which lists its tensors",
        "copy the distributed checkpoint's .metadata too, or save it again",
    ),
    (
        lambda name: name.startswith("rank-") and name.endswith(".safetensors"),
        f"{MANIFEST}, which describes how rank files were sharded",
        f"copy {MANIFEST} too, or reshard again",
    ),
    (
        lambda name: name.endswith(".safetensors"),
        f"{WEIGHTS} or {INDEX}",
        f"copy {INDEX} too, or save the model again with save_pretrained",
    ),
    (
        lambda name: Path(name).suffix in WEIGHT_SUFFIXES,
        f"{WEIGHTS} or {INDEX}",
        "load it with transformers and save it with save_pretrained, which writes safetensors",
    ),
)
"""Files that look like weights but cannot be read without another file: how to recognize them, and the next step."""


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
        IncompleteError: a tensor of the model is not stored.
        MismatchError: the stored shapes are not the model's.
        UsageError: stored tensors are quantized where the model's are not, or the other way round.
    """
    hub = read_hub(folder)
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
        tensor_maps={**conversion.tensor_maps, **{name: whole(name, info.shape) for name, info in passthrough.items()}},
        chunks=hub.tensors,
        side_files=hub.side_files,
        stored_form=_build_stored_form(hub),
    )


def _check_duplicates(hub: HubCheckpoint, conversion: Conversion, tied: Mapping[str, str]) -> None:
    """Refuse a tied name that is stored although its target is, unless both have the same bytes."""
    for name, tensor_map in conversion.duplicates.items():
        own, target = (_get_whole_tensor(form, hub) for form in (tensor_map, conversion.tensor_maps[tied[name]]))
        if own is None or target is None or not has_same_bytes(own, target):
            raise ConversionError(
                f"{name} is tied to {tied[name]} but stored with other values",
                hint="set tie_word_embeddings to false in config.json, or remove one of the two",
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
