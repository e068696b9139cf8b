"""x"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from plans.errors import CheckpointError, ConversionError, HeaderError, IncompleteError
from runtime.checkpoint.checkpoint import Checkpoint, TensorInfo
from runtime.checkpoint.files.file_names import INDEX, MANIFEST, WEIGHTS, is_weight_file
from runtime.checkpoint.files.reading import convert_read_errors
from runtime.checkpoint.files.safetensors import Header, StoredTensor, has_same_bytes, read_header
from runtime.checkpoint.files.side_files import WEIGHT_SUFFIXES, SideFiles, check_contained, find_side_files
from runtime.checkpoint.files.strict_json import is_nested_deeper, parse_strict_json
from runtime.checkpoint.hub.conversion import Conversion, convert
from runtime.checkpoint.hub.quantized import check_dtypes, check_quantized, check_scales, check_unquantized
from runtime.checkpoint.manifest import StoredForm
from runtime.models.dtypes import dtype_name
from runtime.models.model import find_tied_names, model_tensors, tensor_kind
from runtime.models.quantized import is_quantized
from runtime.tensor_map.tensor_map import TensorMap, whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["HubCheckpoint", "check_duplicates", "read_hub", "read_hub_checkpoint"]


_MAX_INDEX = 100_000_000
_MAX_DEPTH = 16


@dataclass(frozen=True)
class HubCheckpoint:
    """A folder in hub form, headers read and checked, no tensor touched.

    Args:
        folder: where it lies.
        headers: of the weight files, in the order of their names.
        tensors: every stored tensor by its stored name.
        index: the index file's content without its map of tensors, None when there is no index.
        side_files: the other files: config, tokenizer, licence.
    """

    folder: Path
    headers: tuple[Header, ...]
    tensors: Mapping[str, StoredTensor]
    index: Mapping[str, object] | None
    side_files: SideFiles


def read_hub(folder: Path) -> HubCheckpoint:
    """Read what a folder in hub form holds.

    As transformers does, `model.safetensors` is taken before an index. Weights in other formats and weight files that
    the index does not name are not part of the checkpoint.

    Raises:
        IncompleteError: weights are missing or cut short.
        HeaderError: an index or header does not tell the truth about the files.
        CheckpointError: the folder is none, or a link leads out of it.
    """
    with convert_read_errors(folder):
        if not folder.is_dir():
            raise CheckpointError(
                f"{folder}: not a folder", hint="name the folder that holds config.json and weights", folder=str(folder)
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
    return HubCheckpoint(folder, headers, _merge_headers(headers), index, find_side_files(folder, used))


def _read_index(folder: Path) -> tuple[dict[str, object], dict[str, str]]:
    path = _resolve_path(folder, INDEX)
    if path.stat().st_size > _MAX_INDEX:
        raise HeaderError(
            f"{path}: an index of over {_MAX_INDEX} bytes", hint="the index is damaged; save it again", file=str(path)
        )
    content = parse_strict_json(path.read_bytes(), path)
    match content.pop("weight_map", None):
        case dict(weight_map) if weight_map and all(isinstance(name, str) for name in weight_map.values()):
            pass
        case _:
            raise HeaderError(
                f"{path}: no weight_map of tensors to files", hint="download the index again", file=str(path)
            )
    for tensor, name in weight_map.items():
        if not is_weight_file(name):
            raise HeaderError(
                f"{path}: tensor {tensor!r} is said to be in {name!r}, not a safetensors file of this folder",
                hint="an index names files beside itself; do not trust this checkpoint",
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
    """Return the file's path; a link may lead only to the folder itself or to the hub cache's blobs beside it."""
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
                f"{index}: tensor {name!r} is said to be in {file} but is in {tensors[name].file.name}",
                hint="the index belongs to another version of the checkpoint; download both again",
                tensor=name,
            )
    for name, tensor in tensors.items():
        if name not in weight_map:
            raise HeaderError(
                f"{index}: does not name tensor {name!r} of {tensor.file.name}",
                hint="the index belongs to another version of the checkpoint; download both again",
                tensor=name,
            )


def _no_weights_error(folder: Path) -> CheckpointError:
    """Return the error for a folder whose files no layout knows, by the first of them that looks like weights."""
    files = sorted(path.name for path in folder.iterdir())
    for is_one, missing, hint in _NEAR_MISSES:
        if found := [name for name in files if is_one(name)]:
            return IncompleteError(f"{folder}: {found[0]} is there, but no {missing}", hint=hint, files=found)
    return IncompleteError(
        f"{folder}: no {WEIGHTS} or {INDEX}", hint="name the folder that holds the weights", folder=str(folder)
    )


_NEAR_MISSES: Sequence[tuple[Callable[[str], bool], str, str]] = (
    (
        lambda name: name.endswith(".distcp"),
        ".metadata, which says what it holds",
        "copy .metadata of the distributed checkpoint too, or save it again",
    ),
    (
        lambda name: name.startswith("rank-") and name.endswith(".safetensors"),
        f"{MANIFEST}, which says how rank files were cut",
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
"""What looks like weights but lacks what makes them readable, and the next step."""


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


def read_hub_checkpoint(folder: Path, model: PreTrainedModel) -> Checkpoint:
    """Read a checkpoint in hub form up to its headers.

    Args:
        folder: the checkpoint's folder.
        model: the model that its config describes, on meta.

    Raises:
        HeaderError: an index or header is damaged.
        CheckpointError: the folder cannot be read, or a link leads out of it.
        ConversionError: stored tensors do not make the model's by operations that are known, or mix dtypes.
        IncompleteError: a tensor of the model is stored nowhere.
        MismatchError: stored shapes are not the model's.
        UsageError: stored tensors are quantized otherwise than the model's.
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
