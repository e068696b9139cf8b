"""Read a torch distributed checkpoint of a model, as shard files or as `.distcp` files."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from plans.errors import ConversionError, HeaderError, MismatchError
from plans.text import format_names
from runtime.checkpoint.checkpoint import Checkpoint, SourceLayout, TensorInfo
from runtime.checkpoint.dcp.chunks import Chunk, infer_shapes, join_chunks
from runtime.checkpoint.dcp.experts import check_experts_numbered
from runtime.checkpoint.dcp.saved import SavedTensors, read_saved_tensors
from runtime.checkpoint.files.file_names import MANIFEST
from runtime.checkpoint.files.safetensors import StoredTensor, find_dtypes
from runtime.checkpoint.files.side_files import SideFiles, find_side_files
from runtime.checkpoint.hub.conversion import convert, find_model_names
from runtime.checkpoint.hub.quantized import check_dtypes, check_quantized, check_scales, check_unquantized
from runtime.checkpoint.manifest import Manifest, TensorKind
from runtime.checkpoint.near_names import build_missing_error
from runtime.models.dtypes import dtype_name
from runtime.models.model import describe_assumed_class, find_tied_names, model_tensors, tensor_kind
from runtime.models.quantized import is_quantized
from runtime.tensor_map.compose import compose
from runtime.tensor_map.tensor_map import Shape, TensorMap, whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["build_model_checkpoint", "read_dcp_checkpoint"]


_SAVED_AGAIN = (
    "the folder was saved into again; move migrator.json out of it to read it without its record, "
    "or reshard again from the original"
)


def read_dcp_checkpoint(
    folder: Path, model: PreTrainedModel, manifest: Manifest | None = None, weights: Path | None = None
) -> Checkpoint:
    """Return what a distributed checkpoint holds of a model.

    Args:
        folder: the checkpoint's folder.
        model: the model that its config describes, on meta.
        manifest: the checkpoint's manifest, None if it has none; the files must agree with it, and its names are used.
        weights: the folder of the weights, below the checkpoint's own or the same.

    Raises:
        IncompleteError: a file or tensor is missing, or the checkpoint is lossy.
        HeaderError: headers or metadata are wrong, or chunks overlap.
        MismatchError: shapes are not the model's, replicas differ, or the manifest lists other tensors.
        ConversionError: a tied name holds other values than its target.
        UsageError: stored tensors are quantized differently from the model's.
    """
    weights = weights or folder
    tied = find_tied_names(model)
    stored_names = manifest.stored_names if manifest is not None else {}
    wanted = [stored_names.get(name, name) for name in model_tensors(model) if name not in tied]
    saved = _rename_tensors(
        read_saved_tensors(weights, wanted, model), {stored: name for name, stored in stored_names.items()}
    )
    used = {(weights / name).relative_to(folder).as_posix() for name in saved.files}
    side_files = find_side_files(folder, {MANIFEST, *used})
    checkpoint = build_model_checkpoint(folder, saved, model, layout="dcp", side_files=side_files)
    return _apply_manifest(checkpoint, manifest) if manifest is not None else checkpoint


def _rename_tensors(saved: SavedTensors, names: Mapping[str, str]) -> SavedTensors:
    return replace(
        saved,
        chunks=[replace(chunk, name=names.get(chunk.name, chunk.name)) for chunk in saved.chunks],
        declared_shapes={names.get(name, name): shape for name, shape in saved.declared_shapes.items()},
        names=[names.get(name, name) for name in saved.names],
    )


def build_model_checkpoint(
    folder: Path,
    saved: SavedTensors,
    model: PreTrainedModel,
    *,
    layout: SourceLayout,
    side_files: SideFiles,
    extra_files: Mapping[str, bytes] | None = None,
) -> Checkpoint:
    """Return the checkpoint of a model whose tensors are stored in chunks, under the names that they have in it.

    Args:
        folder: the checkpoint's folder.
        saved: the tensors that its files store.
        model: the model that its config describes, on meta.
        layout: the layout of the files.
        side_files: the other files of the folder.
        extra_files: the content of files that belong to the checkpoint under other names than they have, by name.

    Raises:
        IncompleteError: a tensor is missing, or the checkpoint is lossy.
        HeaderError: chunks overlap, or differ in their dtype.
        MismatchError: shapes are not the model's, or replicas differ.
        ConversionError: a tied name holds other values than its target.
        UsageError: stored tensors are quantized differently from the model's.
    """
    of_model = model_tensors(model)
    dtypes = find_dtypes((chunk.name, chunk.stored) for chunk in saved.chunks)
    check_experts_numbered(folder, {**infer_shapes(saved.chunks), **saved.declared_shapes}, model)
    tensors = _convert_hub_names(folder, saved, model) if saved.has_hub_names else _map_names(folder, saved, model)
    stored_chunks = {chunk.stored_name: chunk.stored for chunk in saved.chunks}
    _check_quantization(tensors.maps, stored_chunks, model)
    return Checkpoint(
        folder=folder,
        layout=layout,
        tensors={
            name: TensorInfo(
                _get_kind(of_model.get(name)),
                _find_dtype(name, [dtypes[source] for source in tensors.sources[name]], of_model.get(name)),
                tensor_map.shape,
            )
            for name, tensor_map in tensors.maps.items()
        },
        tied=find_tied_names(model),
        tensor_maps=tensors.maps,
        chunks=stored_chunks,
        side_files=SideFiles(side_files.copied, (*side_files.left_behind, *saved.left_behind)),
        extra_files=extra_files or {},
        reoriented=tensors.reoriented,
    )


@dataclass(frozen=True)
class _MappedTensors:
    """The model's tensors, in its order, then the passthrough tensors.

    Args:
        maps: the tensors over the stored chunks.
        sources: the saved tensors that each is made of.
        reoriented: those that transformers would read otherwise.
    """

    maps: Mapping[str, TensorMap]
    sources: Mapping[str, Sequence[str]]
    reoriented: tuple[str, ...] = field(default=())


def _map_names(folder: Path, saved: SavedTensors, model: PreTrainedModel) -> _MappedTensors:
    """Return tensors that are saved under the names that they have in the model."""
    tied = find_tied_names(model)
    shapes = {name: tuple(tensor.shape) for name, tensor in model_tensors(model).items()}
    stored = {**infer_shapes(saved.chunks), **saved.declared_shapes}
    for name in saved.declared_shapes.keys() & shapes.keys():
        _check_shape(name, saved.declared_shapes[name], shapes[name], folder)
    tensor_maps = join_chunks(saved.chunks, {name: shapes.get(name, shape) for name, shape in stored.items()})
    sources = {name: [name] for name in tensor_maps}
    for name in tied.keys() & tensor_maps.keys():
        tensor_maps[tied[name]] = _map_tied_tensor(name, tied[name], saved.chunks, tensor_maps.pop(name).shape)
        sources.setdefault(tied[name], []).append(name)
    missing = [name for name in shapes if name not in tensor_maps and name not in tied]
    if missing:
        raise build_missing_error(
            folder,
            missing,
            [name for name in shapes if name not in tied],
            saved.names,
            lambda: find_model_names(model, saved.names),
            describe_assumed_class(model),
        )
    order = (*(name for name in shapes if name not in tied), *(name for name in tensor_maps if name not in shapes))
    return _MappedTensors({name: tensor_maps[name] for name in order}, sources)


def _convert_hub_names(folder: Path, saved: SavedTensors, model: PreTrainedModel) -> _MappedTensors:
    """Return tensors that are saved under the names of the hub form, converted as transformers converts that."""
    tied = find_tied_names(model)
    shapes = {name: tuple(tensor.shape) for name, tensor in model_tensors(model).items() if name not in tied}
    stored = join_chunks(saved.chunks, {**infer_shapes(saved.chunks), **saved.declared_shapes})
    conversion = convert(model, {name: tensor_map.shape for name, tensor_map in stored.items()}, shapes, tied)
    over_chunks = compose(stored)
    for name, tensor_map in conversion.duplicates.items():
        target = conversion.tensor_maps[tied[name]]
        if any(len(one.sources) != 1 or one != whole(one.sources[0], one.shape) for one in (tensor_map, target)):
            raise _tied_error(name, tied[name])
        _map_tied_tensor(tensor_map.sources[0], target.sources[0], saved.chunks, target.shape)
    maps = {
        **conversion.tensor_maps,
        **{name: whole(name, stored[name].shape) for name in conversion.passthrough},
        **conversion.dropped,
    }
    return _MappedTensors(
        {name: over_chunks(tensor_map) for name, tensor_map in maps.items()},
        {name: tensor_map.sources for name, tensor_map in maps.items()},
        conversion.reoriented,
    )


def _find_dtype(name: str, dtypes: Collection[str], tensor: torch.Tensor | None) -> str:
    """Return the dtype that a tensor is stored in; bytes are copied, never cast."""
    distinct = sorted(set(dtypes)) or [dtype_name(tensor.dtype)] if tensor is not None else sorted(set(dtypes))
    if len(distinct) > 1:
        raise ConversionError(
            f"{name} would mix dtypes: {' and '.join(distinct)}", hint="save the checkpoint in one dtype", name=name
        )
    return distinct[0]


def _map_tied_tensor(name: str, target: str, chunks: Sequence[Chunk], shape: Shape) -> TensorMap:
    """Return the tensor map of a tensor that is also, or only, saved under a tied name; replicas must be equal."""
    both = [replace(chunk, name=target) for chunk in chunks if chunk.name in (name, target)]
    try:
        return join_chunks(both, {target: shape})[target]
    except (MismatchError, HeaderError) as error:
        raise _tied_error(name, target) from error


def _tied_error(name: str, target: str) -> ConversionError:
    return ConversionError(
        f"{name} is tied to {target} but stored with other values",
        hint="set tie_word_embeddings to false in config.json, or save the model again with its weights tied",
        name=name,
        tied_to=target,
    )


def _check_shape(name: str, declared: Shape, expected: Shape, folder: Path) -> None:
    if declared != expected:
        raise MismatchError(
            f"{folder}: {name} is {list(expected)} in the model but {list(declared)} in the checkpoint",
            hint="config.json does not belong to these weights",
            name=name,
            expected=list(expected),
            found=list(declared),
        )


def _check_quantization(
    tensor_maps: Mapping[str, TensorMap], stored_chunks: Mapping[str, StoredTensor], model: PreTrainedModel
) -> None:
    """Refuse tensors that are quantized differently from the model's."""
    of_model = model_tensors(model)
    if is_quantized(model):
        check_quantized(stored_chunks)
    else:
        check_unquantized(tensor_maps.keys(), of_model.keys())
    wanted = {name: dtype_name(of_model[name].dtype) for name in tensor_maps if name in of_model}
    check_dtypes({name: tensor_maps[name] for name in wanted}, wanted, stored_chunks)
    check_scales([name for name in tensor_maps if name not in of_model], tensor_maps.keys())


def _get_kind(tensor: torch.Tensor | None) -> TensorKind:
    return "carried" if tensor is None else tensor_kind(tensor)


def _apply_manifest(checkpoint: Checkpoint, manifest: Manifest) -> Checkpoint:
    """Return the checkpoint with its manifest, which must record these tensors."""
    recorded = {name: TensorInfo(entry.kind, entry.dtype, entry.shape) for name, entry in manifest.tensors.items()}
    differing = _find_differing(recorded, checkpoint.tensors) or _find_differing(manifest.tied, checkpoint.tied)
    if differing:
        raise MismatchError(
            f"{checkpoint.folder}: the manifest and the files differ in {format_names(differing)}",
            hint=_SAVED_AGAIN,
            tensors=differing,
        )
    return replace(checkpoint, manifest=manifest, find_stored_form=lambda: manifest.stored_form)


def _find_differing(first: Mapping[str, object], second: Mapping[str, object]) -> list[str]:
    names: Collection[str] = first.keys() | second.keys()
    return sorted(name for name in names if first.get(name) != second.get(name))
