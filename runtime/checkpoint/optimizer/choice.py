"""Whether an optimizer's state goes along with its model's checkpoint, and what of it is in the way if it does not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from plans.errors import IncompleteError, MismatchError
from plans.text import format_names
from runtime.checkpoint.checkpoint import Checkpoint, OptimizerState
from runtime.checkpoint.files.side_files import SideFiles
from runtime.checkpoint.optimizer.reader import OptimizerCheckpoint, find_optimizer, read_optimizer
from runtime.checkpoint.ranks.manifest import find_manifest
from runtime.checkpoint.record import MANIFEST

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["select_optimizer"]


def select_optimizer(
    checkpoint: Checkpoint, model: PreTrainedModel, *, include: bool, require: bool = False
) -> Checkpoint:
    """Return a checkpoint with the state of its optimizer, or without the files of it.

    Args:
        checkpoint: of the model's checkpoint, where an optimizer's files are side files like others.
        model: that it is of, on meta.
        include: take the state along where there is one.
        require: there must be one.

    Raises:
        IncompleteError: there is none though there must be, or it is not whole.
        MismatchError: it is of another model, or not the one that the manifest speaks of.
        ConversionError: a state is not laid out like its parameter.
        CheckpointError: it is damaged, or there are several.
    """
    found = find_optimizer(checkpoint)
    if found is None:
        if include:
            _check_none_lost(checkpoint)
        if require:
            raise IncompleteError(
                f"{checkpoint.folder}: no optimizer's state in it",
                hint="save it there with save_optimizer_distributed, or leave `optimizer` out",
                folder=str(checkpoint.folder),
            )
        return checkpoint
    if not include:
        note = f"the optimizer's state in {checkpoint.folder / found.folder}, which --optimizer takes along"
        return replace(checkpoint, side_files=_select_side_files(checkpoint, found, note))
    state = read_optimizer(checkpoint, found, model)
    recorded = _match_manifest_digests(checkpoint, state)
    return replace(
        checkpoint,
        side_files=_select_side_files(checkpoint, found),
        optimizer=state,
        digests={**checkpoint.digests, **recorded},
    )


def _select_side_files(checkpoint: Checkpoint, optimizer: OptimizerCheckpoint, *notes: str) -> SideFiles:
    """Return the side files that are none of the optimizer's."""
    others = tuple(name for name in checkpoint.side_files.copied if name not in optimizer.files)
    strays = tuple(sorted(name for name in optimizer.files if name not in optimizer.current_files))
    return SideFiles(others, (*checkpoint.side_files.left_behind, *strays, *notes))


def _match_manifest_digests(checkpoint: Checkpoint, state: OptimizerState) -> Mapping[str, str]:
    """Return the digests that the manifest has of the optimizer's tensors, none where it was written without one."""
    recorded = _read_manifest_digests(checkpoint)
    differing = sorted(recorded.keys() ^ state.tensors.keys()) if recorded else []
    if differing:
        raise MismatchError(
            f"{checkpoint.folder}: the manifest and the optimizer's files differ in {format_names(differing)}",
            hint="the optimizer was saved again into the folder; remove migrator.json",
            tensors=differing,
        )
    return recorded


def _check_none_lost(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint that was written with an optimizer's state which is gone."""
    if lost := list(_read_manifest_digests(checkpoint)):
        raise IncompleteError(
            f"{checkpoint.folder}: the optimizer's state is missing, of which {MANIFEST} records {format_names(lost)}",
            hint="copy its files again, or leave the state out with `optimizer=False`",
            missing=lost,
        )


def _read_manifest_digests(checkpoint: Checkpoint) -> Mapping[str, str]:
    manifest = find_manifest(checkpoint.folder)
    return manifest.optimizer if manifest else {}
