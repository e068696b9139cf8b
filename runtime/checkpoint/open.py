"""Reading what a checkpoint of whatever layout holds of a model."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from plans.errors import IncompleteError, MismatchError
from plans.text import format_names
from runtime.checkpoint.checkpoint import Checkpoint, Layout, TensorInfo
from runtime.checkpoint.dcp.names import METADATA, find_shard_files
from runtime.checkpoint.dcp.reader import read_dcp_checkpoint
from runtime.checkpoint.external.reader import read_external
from runtime.checkpoint.external.source import ExternalSettings
from runtime.checkpoint.files.file_names import INDEX, WEIGHTS
from runtime.checkpoint.files.reading import convert_read_errors
from runtime.checkpoint.hub.folder import read_hub
from runtime.checkpoint.hub.reader import build_hub_checkpoint
from runtime.checkpoint.ranks.files import RankCheckpoint
from runtime.checkpoint.record import MANIFEST
from runtime.models.model import find_tied_names, model_tensors, tensor_kind

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["check_matches_model", "detect_layout", "read_checkpoint"]


def detect_layout(folder: Path) -> Layout:
    """Return how a checkpoint lies in a folder, by the names of its files; hub form where nothing says otherwise."""
    with convert_read_errors(folder):
        if folder.is_dir() and find_shard_files(folder):
            return "dcp"
    if (folder / MANIFEST).is_file():
        return "ranks"
    is_hub = any((folder / name).exists() for name in (WEIGHTS, INDEX))
    return "dcp" if (folder / METADATA).is_file() and not is_hub else "hf"


_HINT = "config.json does not belong to these weights; put back the one that they were written with"


def check_matches_model(checkpoint: Checkpoint, model: PreTrainedModel) -> None:
    """Refuse a checkpoint that is of another model than its config describes.

    Args:
        checkpoint: of the checkpoint.
        model: that its config describes, on meta.

    Raises:
        IncompleteError: the model has a tensor that the checkpoint lacks.
        MismatchError: the checkpoint has one that the model lacks, or ties names, or has kinds or shapes, otherwise.
    """
    tied = find_tied_names(model)
    wanted = {name: tensor for name, tensor in model_tensors(model).items() if name not in tied}
    held = {name: tensor for name, tensor in checkpoint.tensors.items() if tensor.kind != "carried" or name in wanted}
    _check_tied(checkpoint.folder, tied, checkpoint.tied)
    if missing := [name for name in wanted if name not in held]:
        raise IncompleteError(
            f"{checkpoint.folder}: {format_names(missing)} of the model are stored nowhere", hint=_HINT, missing=missing
        )
    if surplus := [name for name in held if name not in wanted]:
        raise MismatchError(
            f"{checkpoint.folder}: {format_names(surplus)} of the checkpoint are no tensors of the model",
            hint=_HINT,
            tensors=surplus,
        )
    for name, tensor in wanted.items():
        expected = TensorInfo(tensor_kind(tensor), "", tuple(tensor.shape))
        _check_kind_and_shape(checkpoint.folder, name, expected, held[name])


def _check_tied(folder: Path, expected: Mapping[str, str], found: Mapping[str, str]) -> None:
    names: Collection[str] = expected.keys() | found.keys()
    for name in sorted(names):
        wanted, has = (f"tied to {ties[name]}" if name in ties else "not tied" for ties in (expected, found))
        if wanted != has:
            raise MismatchError(
                f"{folder}: {name} is {wanted} in the model but {has} in the checkpoint",
                hint=f"{_HINT}; tie_word_embeddings says which names are tied",
                name=name,
            )


def _check_kind_and_shape(folder: Path, name: str, expected: TensorInfo, found: TensorInfo) -> None:
    """Refuse a tensor of another kind or shape; dtypes are the checkpoint's own."""
    for wanted, has in ((expected.kind, found.kind), (list(expected.shape), list(found.shape))):
        if wanted != has:
            raise MismatchError(
                f"{folder}: {name} is {wanted} in the model but {has} in the checkpoint", hint=_HINT, name=name
            )


def read_checkpoint(folder: Path, model: PreTrainedModel, external: ExternalSettings | None = None) -> Checkpoint:
    """Read what a checkpoint holds of a model, no tensor but those that must be the same in several places.

    Args:
        folder: of the checkpoint.
        model: that its config describes, on meta.
        external: how to read another stack's rank files, where it is made of such.

    Raises:
        CheckpointError: it is damaged, incomplete or of another model.
        MismatchError: its tensors are not the model's.
        UsageError: it is quantized.
        PlanError: the plan of foreign rank files does not go with the model.
    """
    content = read_external(folder, model, external) if external else _read_by_layout(folder, model)
    check_matches_model(content, model)
    return content


def _read_by_layout(folder: Path, model: PreTrainedModel) -> Checkpoint:
    match detect_layout(folder):
        case "dcp":
            return read_dcp_checkpoint(folder, model)
        case "ranks":
            return RankCheckpoint.read(folder).to_checkpoint()
        case "hf":
            return build_hub_checkpoint(read_hub(folder), model)
