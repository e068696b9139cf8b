"""Find the bytes of this rank's tensors in a checkpoint's files, in any layout."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Set
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
from runtime.checkpoint.renamed import use_model_names
from runtime.loader.parameter_refs import ParameterRef
from runtime.models.dtypes import DTYPE_NAMES, DTYPES
from runtime.models.model import init_on_meta
from runtime.parallel.pipeline import find_stage
from runtime.tensor_map.tensor_map import Shape, TensorMap, TensorMapError, whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["LoadSource", "find_source"]

_OTHER_MODEL = "the checkpoint belongs to another model; use the one that this model's config came with"


@dataclass(frozen=True)
class LoadSource:
    """What a rank reads from.

    Args:
        folder: the checkpoint's folder.
        dtypes: the stored dtype of each tensor, by safetensors' names.
        shapes: the shape of each whole tensor.
        tensor_maps: the map of each of this rank's local tensors to the stored chunks.
        local_maps: the map of each of this rank's local tensors to the whole one.
        chunks: the stored chunks by name.
        digests: the digest that is recorded for each whole tensor, empty if none are.
    """

    folder: Path
    dtypes: Mapping[str, str]
    shapes: Mapping[str, Shape]
    tensor_maps: Mapping[str, TensorMap] = field(repr=False)
    local_maps: Mapping[str, TensorMap] = field(repr=False)
    chunks: Mapping[str, StoredTensor] = field(repr=False)
    digests: Mapping[str, str] = field(repr=False)


def find_source(checkpoint: Path | Checkpoint, model: PreTrainedModel, refs: Mapping[str, ParameterRef]) -> LoadSource:
    """Return what this rank reads: its own rank file if that is sharded like the model, else slices of any files.

    Args:
        checkpoint: a folder in any layout, or a checkpoint that was already read.
        model: the model to fill.
        refs: its tensors by name.

    Raises:
        IncompleteError: a file or a tensor of the model is missing.
        MismatchError: the checkpoint holds tensors that the model lacks, or tensors of other shapes or kinds.
        CheckpointError: the checkpoint is damaged, or has a dtype that torch lacks.
        UsageError: the checkpoint is quantized, or a tensor of the model has an unsupported placement.
    """
    opened = checkpoint if isinstance(checkpoint, Checkpoint) else open_checkpoint(checkpoint)
    stage = find_stage(model)
    elsewhere = stage.elsewhere if stage is not None else frozenset[str]()
    if stage is not None:  # the checkpoint is that of the whole model
        model = _build_whole(model)
    source = None
    if opened.layout == "ranks" and opened.manifest is not None:
        manifest = use_model_names(opened.manifest, model, opened.folder)
        source = _read_own_rank_file(opened.folder, manifest, refs, elsewhere)
    if source is None:
        read = opened if isinstance(opened, Checkpoint) else opened.read_headers(model)
        source = _map_slices(read, refs, elsewhere)
    _check_dtype_kinds(source, refs, opened.folder)
    return source


def _build_whole(stage: PreTrainedModel) -> PreTrainedModel:
    """Return the model on meta that a pipeline stage is a part of."""
    whole_model = init_on_meta(lambda: type(stage)(copy.deepcopy(stage.config)), None)
    whole_model.tie_weights()
    return whole_model


def _read_own_rank_file(
    folder: Path, manifest: Manifest, refs: Mapping[str, ParameterRef], elsewhere: Set[str]
) -> LoadSource | None:
    """Return what this rank's own file holds, None if the checkpoint is sharded differently from the model."""
    entries = {name: entry for name, entry in manifest.tensors.items() if entry.kind != "carried"}
    _check_tensors({name: entry.shape for name, entry in entries.items()}, refs, elsewhere, folder)
    rank = (dist.get_rank() if dist.is_initialized() else 0) % manifest.mesh.world_size
    if not _has_same_shards(manifest, refs, rank):
        return None
    stored = read_rank_header(folder, manifest, rank).tensors
    mesh, number = manifest.mesh.one_replica, manifest.mesh.find_file(rank)
    assert all(is_in_rank_file(entries[name], mesh, number) for name in refs)
    return LoadSource(
        folder=folder,
        dtypes={name: entries[name].dtype for name in refs},
        shapes={name: ref.shape for name, ref in refs.items()},
        tensor_maps={name: whole(name, stored[name].shape) for name in refs},
        local_maps=_map_local(refs),
        chunks=stored,
        digests={name: entries[name].digest for name in refs},
    )


def _has_same_shards(manifest: Manifest, refs: Mapping[str, ParameterRef], rank: int) -> bool:
    """Return whether a rank's file holds exactly the elements that the rank holds of the model."""
    for name, ref in refs.items():
        full, entry = whole(name, ref.shape), manifest.tensors[name]
        if not manifest.mesh.holds(rank, entry.stages):
            return False
        if map_local_tensor(full, entry, manifest.mesh, rank) != ref.map_local(full):
            return False
    return True


def _map_slices(checkpoint: Checkpoint, refs: Mapping[str, ParameterRef], elsewhere: Set[str]) -> LoadSource:
    tensors = {name: tensor for name, tensor in checkpoint.tensors.items() if tensor.kind != "carried"}
    _check_tensors({name: tensor.shape for name, tensor in tensors.items()}, refs, elsewhere, checkpoint.folder)
    try:
        tensor_maps = {name: ref.map_local(checkpoint.tensor_maps[name]) for name, ref in refs.items()}
    except TensorMapError as error:
        raise ConversionError(f"{checkpoint.folder}: {error}", hint="choose another mesh size") from error
    return LoadSource(
        folder=checkpoint.folder,
        dtypes={name: tensors[name].dtype for name in refs},
        shapes={name: ref.shape for name, ref in refs.items()},
        tensor_maps=tensor_maps,
        local_maps=_map_local(refs),
        chunks=checkpoint.chunks,
        digests={name: checkpoint.digests[name] for name in refs} if checkpoint.digests else {},
    )


def _map_local(refs: Mapping[str, ParameterRef]) -> dict[str, TensorMap]:
    return {name: ref.map_local(whole(name, ref.shape)) for name, ref in refs.items()}


def _check_tensors(
    shapes: Mapping[str, tuple[int, ...]], refs: Mapping[str, ParameterRef], elsewhere: Set[str], folder: Path
) -> None:
    """Refuse a checkpoint whose tensors are not exactly the model's, and those of its other stages, in their shapes."""
    if missing := sorted(refs.keys() - shapes.keys()):
        raise IncompleteError(
            f"{folder}: lacks {format_names(missing)}",
            hint="the checkpoint is incomplete or belongs to another model",
            tensors=missing,
        )
    if unexpected := sorted(shapes.keys() - refs.keys() - elsewhere):
        raise MismatchError(
            f"{folder}: holds {format_names(unexpected)}, which the model lacks", hint=_OTHER_MODEL, tensors=unexpected
        )
    for name, ref in refs.items():
        if shapes[name] != ref.shape:
            raise MismatchError(
                f"{folder}: {name!r} has shape {list(shapes[name])}, but {list(ref.shape)} in the model",
                hint=_OTHER_MODEL,
                tensor=name,
            )


def _check_dtype_kinds(source: LoadSource, refs: Mapping[str, ParameterRef], folder: Path) -> None:
    """Refuse a dtype of another kind than the model's: only floating-point tensors are cast, to floating point."""
    expected = {name: DTYPE_NAMES[ref.tensor.dtype] for name, ref in refs.items()}
    check_dtypes(source.tensor_maps, expected, source.chunks)
    for name, dtype in source.dtypes.items():
        if dtype not in DTYPES:
            raise CheckpointError(
                f"{folder}: {name!r} has dtype {dtype}, which this version of torch lacks", hint="use a newer torch"
            )
        if dtype != expected[name] and not (DTYPES[dtype].is_floating_point and refs[name].tensor.is_floating_point()):
            raise MismatchError(
                f"{folder}: {name!r} has dtype {dtype}, but {expected[name]} in the model",
                hint=_OTHER_MODEL,
                tensor=name,
            )
