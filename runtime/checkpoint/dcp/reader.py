"""Read a torch distributed checkpoint of a model, as shard files or as `.distcp` files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch

from plans.errors import CheckpointError, ConversionError, HeaderError, MismatchError
from plans.text import format_names
from runtime.checkpoint.checkpoint import Checkpoint, SourceLayout, TensorInfo
from runtime.checkpoint.dcp.chunks import Chunk, infer_shapes, join_chunks
from runtime.checkpoint.dcp.metadata import ChunkMetadata, read_metadata
from runtime.checkpoint.dcp.storage import read_chunks, read_shard_files
from runtime.checkpoint.files.file_names import MANIFEST, METADATA, find_shard_files
from runtime.checkpoint.files.safetensors import StoredTensor, find_dtypes
from runtime.checkpoint.files.side_files import LeftBehind, SideFiles, find_side_files
from runtime.checkpoint.hub.conversion import find_model_names
from runtime.checkpoint.hub.quantized import check_dtypes, check_quantized, check_scales, check_unquantized
from runtime.checkpoint.manifest import Manifest, TensorKind
from runtime.checkpoint.near_names import build_missing_error, strip_wrappers
from runtime.models.dtypes import dtype_name
from runtime.models.model import describe_assumed_class, find_tied_names, model_tensors, tensor_kind
from runtime.models.quantized import is_quantized
from runtime.tensor_map.tensor_map import Shape, TensorMap

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["SavedTensors", "build_model_checkpoint", "read_dcp_checkpoint", "read_saved_tensors", "select_model"]


_Part = TypeVar("_Part", ChunkMetadata, Chunk)


@dataclass(frozen=True)
class SavedTensors:
    """The tensors that a folder stores.

    Args:
        chunks: the chunks of all tensors.
        declared_shapes: the shapes that `.metadata` lists by name; shard files do not list any.
        files: the names of the files that were read.
        left_behind: descriptions of what is saved besides the model.
        names: all saved names, with their prefix.
    """

    chunks: Sequence[Chunk]
    declared_shapes: Mapping[str, Shape]
    files: Collection[str]
    left_behind: Sequence[LeftBehind]
    names: Collection[str]


def read_saved_tensors(folder: Path, model: Collection[str]) -> SavedTensors:
    """Read which chunks a folder stores, from headers only.

    Training jobs save a model inside other state, such as `{"model": …, "optimizer": …}`. Its names then have a prefix,
    and tensors without that prefix are left behind.

    Args:
        folder: the checkpoint's folder, with shard files or `.distcp` files.
        model: the names of the model's tensors.

    Raises:
        IncompleteError: a file is missing or truncated.
        HeaderError: headers or metadata are wrong.
        CheckpointError: the folder contains more than one model.
    """
    files = find_shard_files(folder)
    if files:
        chunks = read_shard_files(folder, files)
        names = dict.fromkeys(chunk.name for chunk in chunks)
        prefix = _find_prefix(names, model, folder)
        return SavedTensors(_strip_prefix(prefix, chunks), {}, files, _describe_unprefixed(prefix, names), names)
    saved = read_metadata(folder)
    prefix = _find_prefix(saved.shapes, model, folder)
    chunks = read_chunks(folder, _strip_prefix(prefix, saved.chunks))
    shapes = {name.removeprefix(prefix): shape for name, shape in saved.shapes.items() if name.startswith(prefix)}
    left_behind = (
        *_describe_unprefixed(prefix, saved.shapes),
        *(LeftBehind(f"{name!r} of {METADATA}", "no tensor", is_file=False) for name in saved.non_tensors),
    )
    return SavedTensors(chunks, shapes, {METADATA, *saved.files}, left_behind, saved.shapes.keys())


def select_model(
    folder: Path,
    chunks: Sequence[Chunk],
    shapes: Mapping[str, Shape],
    files: Collection[str],
    left_behind: Sequence[LeftBehind],
    model: Collection[str],
) -> SavedTensors:
    """Return the tensors of a model among those that files store, under the names that they have in the model.

    If the model is not complete under the stored names, they are read without what wrappers put into them.

    Args:
        folder: the folder of the files.
        chunks: the chunks of all tensors.
        shapes: their shapes by name.
        files: the names of the files.
        left_behind: what else the files contain.
        model: the names of the model's tensors.

    Raises:
        CheckpointError: the files contain more than one model, or two names are equal without their wrappers.
    """
    prefix = _find_prefix(shapes, model, folder)
    if not all(prefix + name in shapes for name in model):
        _check_distinct(folder, shapes)
        chunks = [replace(chunk, name=strip_wrappers(chunk.name)) for chunk in chunks]
        shapes = {strip_wrappers(name): shape for name, shape in shapes.items()}
        prefix = _find_prefix(shapes, model, folder)
    selected = {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}
    others = (*_describe_unprefixed(prefix, shapes), *left_behind)
    return SavedTensors(_strip_prefix(prefix, chunks), selected, files, others, shapes.keys())


def _check_distinct(folder: Path, names: Iterable[str]) -> None:
    """Refuse names that wrappers alone distinguish."""
    known: dict[str, str] = {}
    for name in names:
        if (other := known.setdefault(strip_wrappers(name), name)) != name:
            raise CheckpointError(
                f"{folder}: {other!r} and {name!r} are one tensor's names without their wrappers",
                hint="save the model that you want alone",
                names=[other, name],
            )


def _find_prefix(names: Collection[str], model: Collection[str], folder: Path) -> str:
    """Return the prefix of the names of all the model's tensors, which is mostly empty."""
    first = next(iter(model))
    if first in names:
        return ""
    ending = f".{first}"
    candidates = [name.removesuffix(first) for name in names if name.endswith(ending)]
    complete = [prefix for prefix in candidates if all(prefix + name in names for name in model)]
    if len(complete) > 1:
        raise CheckpointError(
            f"{folder}: contains several models, under {format_names(complete)}",
            hint="save the model that you want alone",
            prefixes=complete,
        )
    return complete[0] if complete else ""


def _strip_prefix(prefix: str, parts: Iterable[_Part]) -> list[_Part]:
    return [replace(part, name=part.name.removeprefix(prefix)) for part in parts if part.name.startswith(prefix)]


def _rename_tensors(saved: SavedTensors, names: Mapping[str, str]) -> SavedTensors:
    return replace(
        saved,
        chunks=[replace(chunk, name=names.get(chunk.name, chunk.name)) for chunk in saved.chunks],
        declared_shapes={names.get(name, name): shape for name, shape in saved.declared_shapes.items()},
        names=[names.get(name, name) for name in saved.names],
    )


def _describe_unprefixed(prefix: str, names: Iterable[str]) -> tuple[LeftBehind, ...]:
    """Describe the tensors without the prefix, counted by the first part of their names."""
    counts = Counter(name.partition(".")[0] for name in names if not name.startswith(prefix))
    return tuple(
        LeftBehind(f"{word!r} beside the model", f"{count} in number", is_file=False) for word, count in counts.items()
    )


_SAVED_AGAIN = (
    "the folder was saved into again; move migrator.json out of it to read it without its record, "
    "or reshard again from the original"
)


def read_dcp_checkpoint(folder: Path, model: PreTrainedModel, manifest: Manifest | None = None) -> Checkpoint:
    """Return what a distributed checkpoint holds of a model.

    Args:
        folder: the checkpoint's folder.
        model: the model that its config describes, on meta.
        manifest: the checkpoint's manifest, None if it has none; the files must agree with it, and its names are used.

    Raises:
        IncompleteError: a file or tensor is missing, or the checkpoint is lossy.
        HeaderError: headers or metadata are wrong, or chunks overlap.
        MismatchError: shapes are not the model's, replicas differ, or the manifest lists other tensors.
        ConversionError: a tied name holds other values than its target.
        UsageError: stored tensors are quantized differently from the model's.
    """
    tied = find_tied_names(model)
    stored_names = manifest.stored_names if manifest is not None else {}
    wanted = [stored_names.get(name, name) for name in model_tensors(model) if name not in tied]
    saved = _rename_tensors(read_saved_tensors(folder, wanted), {stored: name for name, stored in stored_names.items()})
    side_files = find_side_files(folder, {MANIFEST, *saved.files})
    checkpoint = build_model_checkpoint(folder, saved, model, layout="dcp", side_files=side_files)
    return _apply_manifest(checkpoint, manifest) if manifest is not None else checkpoint


def build_model_checkpoint(
    folder: Path,
    saved: SavedTensors,
    model: PreTrainedModel,
    *,
    layout: SourceLayout,
    side_files: SideFiles,
    config_folder: Path | None = None,
    extra_files: Mapping[str, bytes] | None = None,
) -> Checkpoint:
    """Return the checkpoint of a model whose tensors are stored in chunks, under the names that they have in it.

    Args:
        folder: the checkpoint's folder.
        saved: the tensors that its files store.
        model: the model that its config describes, on meta.
        layout: the layout of the files.
        side_files: the other files of the folder.
        config_folder: the folder of config.json if that is not the checkpoint's own.
        extra_files: the content of files that belong to the checkpoint under other names than they have, by name.

    Raises:
        IncompleteError: a tensor is missing, or the checkpoint is lossy.
        HeaderError: chunks overlap, or differ in their dtype.
        MismatchError: shapes are not the model's, or replicas differ.
        ConversionError: a tied name holds other values than its target.
        UsageError: stored tensors are quantized differently from the model's.
    """
    tied, of_model = find_tied_names(model), model_tensors(model)
    dtypes = find_dtypes((tied.get(chunk.name, chunk.name), chunk.stored) for chunk in saved.chunks)
    tensor_maps = _build_tensor_maps(saved, model, tied, folder)
    stored_chunks = {chunk.stored_name: chunk.stored for chunk in saved.chunks}
    _check_quantization(tensor_maps, stored_chunks, model)
    tensors = {
        name: TensorInfo(_get_kind(of_model.get(name)), dtypes[name], tensor_map.shape)
        for name, tensor_map in tensor_maps.items()
    }
    return Checkpoint(
        folder=folder,
        layout=layout,
        tensors=tensors,
        tied=tied,
        tensor_maps=tensor_maps,
        chunks=stored_chunks,
        side_files=SideFiles(side_files.copied, (*side_files.left_behind, *saved.left_behind)),
        config_folder=config_folder,
        extra_files=extra_files or {},
    )


def _build_tensor_maps(
    saved: SavedTensors, model: PreTrainedModel, tied: Mapping[str, str], folder: Path
) -> dict[str, TensorMap]:
    """Return the tensor maps of the model's tensors, in its order, then of the passthrough tensors."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model_tensors(model).items()}
    stored = {**infer_shapes(saved.chunks), **saved.declared_shapes}
    for name in saved.declared_shapes.keys() & shapes.keys():
        _check_shape(name, saved.declared_shapes[name], shapes[name], folder)
    tensor_maps = join_chunks(saved.chunks, {name: shapes.get(name, shape) for name, shape in stored.items()})
    for name in tied.keys() & tensor_maps.keys():
        tensor_maps[tied[name]] = _map_tied_tensor(name, tied[name], saved.chunks, tensor_maps.pop(name).shape)
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
    return {name: tensor_maps[name] for name in order}


def _map_tied_tensor(name: str, target: str, chunks: Sequence[Chunk], shape: Shape) -> TensorMap:
    """Return the tensor map of a tensor that is also, or only, saved under a tied name; replicas must be equal."""
    both = [replace(chunk, name=target) for chunk in chunks if chunk.name in (name, target)]
    try:
        return join_chunks(both, {target: shape})[target]
    except (MismatchError, HeaderError) as error:
        raise ConversionError(
            f"{name} is tied to {target} but stored with other values",
            hint="set tie_word_embeddings to false in config.json, or save the model again with its weights tied",
            name=name,
            tied_to=target,
        ) from error


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
    return replace(checkpoint, manifest=manifest, stored_form=manifest.stored_form)


def _find_differing(first: Mapping[str, object], second: Mapping[str, object]) -> list[str]:
    names: Collection[str] = first.keys() | second.keys()
    return sorted(name for name in names if first.get(name) != second.get(name))
