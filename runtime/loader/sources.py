"""Sources: where in a checkpoint's files the tensors that this rank holds lie, whatever the layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

from plans.errors import CheckpointError, ConversionError, IncompleteError, MismatchError
from runtime.checkpoint.content import Content
from runtime.checkpoint.files.safetensors import StoredTensor
from runtime.checkpoint.hub.quantized import check_dtypes
from runtime.checkpoint.layout import layout_of
from runtime.checkpoint.ranks.files import held_by, local, read_rank
from runtime.checkpoint.ranks.manifest import read_manifest
from runtime.checkpoint.read import read_content
from runtime.checkpoint.record import Manifest
from runtime.extents.forms import Form, FormError, whole
from runtime.loader.slots import Slot
from runtime.models.dtypes import DTYPE_NAMES, DTYPES
from runtime.wording import listed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Source", "find_source"]

_OTHER_MODEL = "the checkpoint belongs to another model; give the one that this model's config came with"


@dataclass(frozen=True)
class Source:
    """What a rank is to read.

    Args:
        dtypes: of the slots' tensors as they are stored, safetensors' names.
        forms: of this rank's local tensors by slot, over the pieces.
        pieces: what files store.
    """

    dtypes: Mapping[str, str]
    forms: Mapping[str, Form] = field(repr=False)
    pieces: Mapping[str, StoredTensor] = field(repr=False)


def find_source(checkpoint: Path | Content, model: PreTrainedModel, slots: Mapping[str, Slot]) -> Source:
    """Find what this rank's slots are filled from: its own rank file where that holds just these, else what it needs.

    Args:
        checkpoint: a folder of any layout, or what was read of one.
        model: whose slots these are.
        slots: by name.

    Raises:
        IncompleteError: tensors of the model, or files, are missing.
        MismatchError: the checkpoint holds tensors the model lacks, or of other shapes or kinds.
        CheckpointError: it is damaged, or holds what torch cannot.
        UsageError: it is quantized, or a tensor of the model is placed in a way that is no shard.
    """
    folder = checkpoint.folder if isinstance(checkpoint, Content) else checkpoint
    source = _own_file(folder, slots) if layout_of(folder) == "ranks" else None
    if source is None:
        content = checkpoint if isinstance(checkpoint, Content) else read_content(folder, model)
        source = _slices(content, slots)
    _check_kinds(source, slots, folder)
    return source


def _own_file(folder: Path, slots: Mapping[str, Slot]) -> Source | None:
    """Return what this rank's own file holds, None where the checkpoint is laid out otherwise than the model."""
    manifest = read_manifest(folder)
    entries = {name: entry for name, entry in manifest.tensors.items() if entry.kind != "carried"}
    _check_tensors({name: entry.shape for name, entry in entries.items()}, slots, folder)
    is_grouped = dist.is_initialized()
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if is_grouped else (0, 1)
    if world_size != manifest.mesh.world_size or not _held_alike(manifest, slots, rank):
        return None
    stored = read_rank(folder, manifest, rank).tensors
    forms = {name: whole(name, stored[name].shape) for name in slots}
    assert all(held_by(entries[name], rank) for name in slots)
    return Source({name: entries[name].dtype for name in slots}, forms, stored)


def _held_alike(manifest: Manifest, slots: Mapping[str, Slot], rank: int) -> bool:
    """Return whether a rank's file has, element for element, what the rank holds of the model."""
    for name, slot in slots.items():
        logical = whole(name, slot.shape)
        if local(logical, manifest.tensors[name], manifest.mesh, rank) != slot.cut(logical):
            return False
    return True


def _slices(content: Content, slots: Mapping[str, Slot]) -> Source:
    held = {name: one for name, one in content.tensors.items() if one.kind != "carried"}
    _check_tensors({name: one.shape for name, one in held.items()}, slots, content.folder)
    try:
        forms = {name: slot.cut(content.forms[name]) for name, slot in slots.items()}
    except FormError as error:
        raise ConversionError(f"{content.folder}: {error}", hint="choose another mesh size") from error
    return Source({name: held[name].dtype for name in slots}, forms, content.pieces)


def _check_tensors(found: Mapping[str, tuple[int, ...]], slots: Mapping[str, Slot], folder: Path) -> None:
    """Refuse a checkpoint that has not just the tensors of the model, in their shapes."""
    if missing := sorted(slots.keys() - found.keys()):
        raise IncompleteError(
            f"{folder}: no {listed(missing)}", hint="the checkpoint is incomplete or of another model", tensors=missing
        )
    if unexpected := sorted(found.keys() - slots.keys()):
        raise MismatchError(
            f"{folder}: holds {listed(unexpected)}, which the model lacks", hint=_OTHER_MODEL, tensors=unexpected
        )
    for name, slot in slots.items():
        if found[name] != slot.shape:
            raise MismatchError(
                f"{folder}: {name!r} is {list(found[name])} where the model has {list(slot.shape)}",
                hint=_OTHER_MODEL,
                tensor=name,
            )


def _check_kinds(source: Source, slots: Mapping[str, Slot], folder: Path) -> None:
    """Refuse numbers of another kind than the model's: what would be cast must be floating point on both sides."""
    wanted = {name: DTYPE_NAMES[slot.tensor.dtype] for name, slot in slots.items()}
    check_dtypes(source.forms, wanted, source.pieces)
    for name, dtype in source.dtypes.items():
        if dtype not in DTYPES:
            raise CheckpointError(f"{folder}: {name!r} is {dtype}, which torch lacks", hint="use a newer torch")
        if dtype != wanted[name] and not (DTYPES[dtype].is_floating_point and slots[name].tensor.is_floating_point()):
            raise MismatchError(
                f"{folder}: {name!r} is {dtype} where the model has {wanted[name]}", hint=_OTHER_MODEL, tensor=name
            )
