"""Sources: where in a checkpoint's files the tensors that this rank holds lie, whatever the layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

from plans.errors import CheckpointError, ConversionError, IncompleteError, MismatchError
from plans.text import format_names
from runtime.checkpoint.checkpoint import Checkpoint
from runtime.checkpoint.files.safetensors import StoredTensor
from runtime.checkpoint.hub.quantized import check_dtypes
from runtime.checkpoint.manifest import Manifest
from runtime.checkpoint.open import open_checkpoint
from runtime.checkpoint.ranks.files import is_in_rank_file, map_local_tensor, read_rank_header
from runtime.loader.parameter_refs import ParameterRef
from runtime.models.dtypes import DTYPE_NAMES, DTYPES
from runtime.tensor_map.tensor_map import TensorMap, TensorMapError, whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["LoadSource", "find_source"]

_OTHER_MODEL = "the checkpoint belongs to another model; give the one that this model's config came with"


@dataclass(frozen=True)
class LoadSource:
    """What a rank is to read.

    Args:
        dtypes: of the slots' tensors as they are stored, safetensors' names.
        tensor_maps: of this rank's local tensors by slot, over the pieces.
        chunks: what files store.
    """

    dtypes: Mapping[str, str]
    tensor_maps: Mapping[str, TensorMap] = field(repr=False)
    chunks: Mapping[str, StoredTensor] = field(repr=False)


def find_source(checkpoint: Path | Checkpoint, model: PreTrainedModel, refs: Mapping[str, ParameterRef]) -> LoadSource:
    """Find what this rank's slots are filled from: its own rank file where that holds just these, else what it needs.

    Args:
        checkpoint: a folder of any layout, or what was read of one.
        model: whose slots these are.
        refs: by name.

    Raises:
        IncompleteError: tensors of the model, or files, are missing.
        MismatchError: the checkpoint holds tensors the model lacks, or of other shapes or kinds.
        CheckpointError: it is damaged, or holds what torch cannot.
        UsageError: it is quantized, or a tensor of the model is placed in a way that is no shard.
    """
    opened = checkpoint if isinstance(checkpoint, Checkpoint) else open_checkpoint(checkpoint)
    source = None
    if opened.layout == "ranks" and opened.manifest is not None:
        source = _read_own_rank_file(opened.folder, opened.manifest, refs)
    if source is None:
        source = _map_slices(opened if isinstance(opened, Checkpoint) else opened.read_headers(model), refs)
    _check_dtype_kinds(source, refs, opened.folder)
    return source


def _read_own_rank_file(folder: Path, manifest: Manifest, refs: Mapping[str, ParameterRef]) -> LoadSource | None:
    """Return what this rank's own file holds, None where the checkpoint is laid out otherwise than the model."""
    entries = {name: entry for name, entry in manifest.tensors.items() if entry.kind != "carried"}
    _check_tensors({name: entry.shape for name, entry in entries.items()}, refs, folder)
    is_grouped = dist.is_initialized()
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if is_grouped else (0, 1)
    if world_size != manifest.mesh.world_size or not _has_same_shards(manifest, refs, rank):
        return None
    stored = read_rank_header(folder, manifest, rank).tensors
    forms = {name: whole(name, stored[name].shape) for name in refs}
    assert all(is_in_rank_file(entries[name], rank) for name in refs)
    return LoadSource({name: entries[name].dtype for name in refs}, forms, stored)


def _has_same_shards(manifest: Manifest, refs: Mapping[str, ParameterRef], rank: int) -> bool:
    """Return whether a rank's file has, element for element, what the rank holds of the model."""
    for name, slot in refs.items():
        logical = whole(name, slot.shape)
        if map_local_tensor(logical, manifest.tensors[name], manifest.mesh, rank) != slot.map_local(logical):
            return False
    return True


def _map_slices(checkpoint: Checkpoint, refs: Mapping[str, ParameterRef]) -> LoadSource:
    held = {name: one for name, one in checkpoint.tensors.items() if one.kind != "carried"}
    _check_tensors({name: one.shape for name, one in held.items()}, refs, checkpoint.folder)
    try:
        forms = {name: slot.map_local(checkpoint.tensor_maps[name]) for name, slot in refs.items()}
    except TensorMapError as error:
        raise ConversionError(f"{checkpoint.folder}: {error}", hint="choose another mesh size") from error
    return LoadSource({name: held[name].dtype for name in refs}, forms, checkpoint.chunks)


def _check_tensors(shapes: Mapping[str, tuple[int, ...]], refs: Mapping[str, ParameterRef], folder: Path) -> None:
    """Refuse a checkpoint that has not just the tensors of the model, in their shapes."""
    if missing := sorted(refs.keys() - shapes.keys()):
        raise IncompleteError(
            f"{folder}: no {format_names(missing)}",
            hint="the checkpoint is incomplete or of another model",
            tensors=missing,
        )
    if unexpected := sorted(shapes.keys() - refs.keys()):
        raise MismatchError(
            f"{folder}: holds {format_names(unexpected)}, which the model lacks", hint=_OTHER_MODEL, tensors=unexpected
        )
    for name, slot in refs.items():
        if shapes[name] != slot.shape:
            raise MismatchError(
                f"{folder}: {name!r} is {list(shapes[name])} where the model has {list(slot.shape)}",
                hint=_OTHER_MODEL,
                tensor=name,
            )


def _check_dtype_kinds(source: LoadSource, refs: Mapping[str, ParameterRef], folder: Path) -> None:
    """Refuse numbers of another kind than the model's: what would be cast must be floating point on both sides."""
    wanted = {name: DTYPE_NAMES[slot.tensor.dtype] for name, slot in refs.items()}
    check_dtypes(source.tensor_maps, wanted, source.chunks)
    for name, dtype in source.dtypes.items():
        if dtype not in DTYPES:
            raise CheckpointError(f"{folder}: {name!r} is {dtype}, which torch lacks", hint="use a newer torch")
        if dtype != wanted[name] and not (DTYPES[dtype].is_floating_point and refs[name].tensor.is_floating_point()):
            raise MismatchError(
                f"{folder}: {name!r} is {dtype} where the model has {wanted[name]}", hint=_OTHER_MODEL, tensor=name
            )
