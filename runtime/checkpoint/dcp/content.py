"""What a torch distributed checkpoint holds of a model, in safetensors form or as `.distcp` files."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from plans.errors import ConversionError, HeaderError, IncompleteError, MismatchError
from runtime.checkpoint.content import Content, Held
from runtime.checkpoint.dcp.chunks import Chunk, Shape, join, reach
from runtime.checkpoint.dcp.saved import SavedTensors, read_saved
from runtime.checkpoint.files.safetensors import StoredTensor, dtypes_of
from runtime.checkpoint.files.side_files import SideFiles, find_side_files
from runtime.checkpoint.hub.quantized import check_dtypes, check_names, check_quantized, check_scales
from runtime.checkpoint.ranks.manifest import read_manifest
from runtime.checkpoint.record import MANIFEST, EntryKind
from runtime.extents.forms import Form
from runtime.models.dtypes import dtype_name
from runtime.models.model import model_tensors, tensor_kind, tied_names
from runtime.models.quantized import is_quantized
from runtime.wording import listed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["dcp_content"]

_SAVED_AGAIN = "the folder was saved into again; remove migrator.json, or reshard again from the original"


def dcp_content(folder: Path, model: PreTrainedModel) -> Content:
    """Return what a distributed checkpoint holds of a model.

    Args:
        folder: of the checkpoint; where it has our manifest, the two must agree.
        model: that its config describes, on meta.

    Raises:
        IncompleteError: a file or tensor is missing, or the checkpoint is lossy.
        HeaderError: headers or metadata lie, or chunks overlap.
        MismatchError: shapes are not the model's, copies differ, or the manifest is of other tensors.
        ConversionError: a tied name holds other values than its target.
        UsageError: stored tensors are quantized otherwise than the model's.
    """
    tied = tied_names(model)
    of_model = model_tensors(model)
    saved = read_saved(folder, [name for name in of_model if name not in tied])
    dtypes = dtypes_of((tied.get(chunk.name, chunk.name), chunk.stored) for chunk in saved.chunks)
    forms = _forms(saved, of_model, tied, folder)
    pieces = {chunk.piece: chunk.stored for chunk in saved.chunks}
    _check_quantization(forms, pieces, model)
    tensors = {name: Held(_kind(of_model.get(name)), dtypes[name], form.shape) for name, form in forms.items()}
    side = find_side_files(folder, {MANIFEST, *saved.files})
    content = Content(
        folder=folder,
        layout="dcp",
        tensors=tensors,
        tied=tied,
        forms=forms,
        pieces=pieces,
        side=SideFiles(side.copied, (*side.left_behind, *saved.left_behind)),
    )
    return _as_recorded(content) if (folder / MANIFEST).is_file() else content


def _forms(
    saved: SavedTensors, of_model: Mapping[str, torch.Tensor], tied: Mapping[str, str], folder: Path
) -> dict[str, Form]:
    """Return the forms of the model's tensors, in its order, then of those that are carried."""
    shapes = {name: tuple(tensor.shape) for name, tensor in of_model.items()}
    stored = {**reach(saved.chunks), **saved.stated}
    for name in saved.stated.keys() & shapes.keys():
        _check_shape(name, saved.stated[name], shapes[name], folder)
    forms = join(saved.chunks, {name: shapes.get(name, shape) for name, shape in stored.items()})
    for name in tied.keys() & forms.keys():
        forms[tied[name]] = _untied(name, tied[name], saved.chunks, forms.pop(name).shape)
    missing = [name for name in shapes if name not in forms and name not in tied]
    if missing:
        raise IncompleteError(
            f"{folder}: {listed(missing)} of the model are stored nowhere",
            hint="the checkpoint is incomplete, names its tensors otherwise, or config.json belongs to another model",
            missing=missing,
        )
    order = (*(name for name in shapes if name not in tied), *(name for name in forms if name not in shapes))
    return {name: forms[name] for name in order}


def _untied(name: str, target: str, chunks: Sequence[Chunk], shape: Shape) -> Form:
    """Return the form of a tensor that is also, or only, saved under another name: copies of one another."""
    both = [replace(chunk, name=target) for chunk in chunks if chunk.name in (name, target)]
    try:
        return join(both, {target: shape})[target]
    except (MismatchError, HeaderError) as error:
        raise ConversionError(
            f"{name} is tied to {target} but stored with other values",
            hint="set tie_word_embeddings to false in config.json, or save the model again with its weights tied",
            name=name,
            tied_to=target,
        ) from error


def _check_shape(name: str, stated: Shape, expected: Shape, folder: Path) -> None:
    if stated != expected:
        raise MismatchError(
            f"{folder}: {name} is {list(expected)} in the model but {list(stated)} in the checkpoint",
            hint="config.json does not belong to these weights",
            name=name,
            expected=list(expected),
            found=list(stated),
        )


def _check_quantization(forms: Mapping[str, Form], pieces: Mapping[str, StoredTensor], model: PreTrainedModel) -> None:
    """Refuse tensors that are quantized otherwise than the model's."""
    of_model = model_tensors(model)
    if is_quantized(model):
        check_quantized(pieces)
    else:
        check_names(forms.keys(), of_model.keys())
    wanted = {name: dtype_name(of_model[name].dtype) for name in forms if name in of_model}
    check_dtypes({name: forms[name] for name in wanted}, wanted, pieces)
    check_scales([name for name in forms if name not in of_model], forms.keys())


def _kind(tensor: torch.Tensor | None) -> EntryKind:
    return "carried" if tensor is None else tensor_kind(tensor)


def _as_recorded(content: Content) -> Content:
    """Return the content with what its manifest knows besides, if that is of these tensors."""
    manifest = read_manifest(content.folder)
    recorded = {name: Held(entry.kind, entry.dtype, entry.shape) for name, entry in manifest.tensors.items()}
    differing = _differing(recorded, content.tensors) or _differing(manifest.tied, content.tied)
    if differing:
        raise MismatchError(
            f"{content.folder}: the manifest and the files differ in {listed(differing)}",
            hint=_SAVED_AGAIN,
            tensors=differing,
        )
    digests = {name: entry.digest for name, entry in manifest.tensors.items()}
    return replace(content, stored_form=manifest.stored_form, digests=digests, config=manifest.config)


def _differing(one: Mapping[str, object], other: Mapping[str, object]) -> list[str]:
    names: Collection[str] = one.keys() | other.keys()
    return sorted(name for name in names if one.get(name) != other.get(name))
