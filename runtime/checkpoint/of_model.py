"""Whether what a checkpoint holds is what its model has: the same tensors, kinds, shapes and ties, in any layout."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from plans.errors import IncompleteError, MismatchError
from runtime.checkpoint.content import Checkpoint, TensorInfo
from runtime.models.model import find_tied_names, model_tensors, tensor_kind
from runtime.wording import format_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["check_matches_model"]

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
