"""Whether an optimizer's state goes along with its model's checkpoint, and what of it is in the way if it does not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from plans.errors import IncompleteError, MismatchError
from runtime.checkpoint.content import Content
from runtime.checkpoint.files.side_files import SideFiles
from runtime.checkpoint.optimizer.read import FoundOptimizer, find_optimizer, read_optimizer
from runtime.checkpoint.optimizer.state import OptimizerState
from runtime.checkpoint.ranks.manifest import find_manifest
from runtime.checkpoint.record import MANIFEST
from runtime.wording import listed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["with_optimizer"]


def with_optimizer(content: Content, model: PreTrainedModel, *, is_wanted: bool, is_demanded: bool = False) -> Content:
    """Return a checkpoint with the state of its optimizer, or without the files of it.

    Args:
        content: of the model's checkpoint, where an optimizer's files are side files like others.
        model: that it is of, on meta.
        is_wanted: take the state along where there is one.
        is_demanded: there must be one.

    Raises:
        IncompleteError: there is none though there must be, or it is not whole.
        MismatchError: it is of another model, or not the one that the manifest speaks of.
        ConversionError: a state is not laid out like its parameter.
        CheckpointError: it is damaged, or there are several.
    """
    found = find_optimizer(content)
    if found is None:
        if is_wanted:
            _check_never_there(content)
        if is_demanded:
            raise IncompleteError(
                f"{content.folder}: no optimizer's state in it",
                hint="save it there with save_optimizer_distributed, or leave --optimizer out",
                folder=str(content.folder),
            )
        return content
    if not is_wanted:
        note = f"the optimizer's state in {content.folder / found.folder}, which --optimizer takes along"
        return replace(content, side=_side(content, found, note))
    state = read_optimizer(content, found, model)
    recorded = _recorded(content, state)
    return replace(content, side=_side(content, found), optimizer=state, digests={**content.digests, **recorded})


def _side(content: Content, found: FoundOptimizer, *notes: str) -> SideFiles:
    """Return the side files that are none of the optimizer's."""
    others = tuple(name for name in content.side.copied if name not in found.files)
    strays = tuple(sorted(name for name in found.files if name not in found.used))
    return SideFiles(others, (*content.side.left_behind, *strays, *notes))


def _recorded(content: Content, state: OptimizerState) -> Mapping[str, str]:
    """Return the digests that the manifest has of the optimizer's tensors, none where it was written without one."""
    recorded = _in_manifest(content)
    differing = sorted(recorded.keys() ^ state.tensors.keys()) if recorded else []
    if differing:
        raise MismatchError(
            f"{content.folder}: the manifest and the optimizer's files differ in {listed(differing)}",
            hint="the optimizer was saved again into the folder; remove migrator.json",
            tensors=differing,
        )
    return recorded


def _check_never_there(content: Content) -> None:
    """Refuse a checkpoint that was written with an optimizer's state which is gone."""
    if lost := list(_in_manifest(content)):
        raise IncompleteError(
            f"{content.folder}: the optimizer's state is missing, of which {MANIFEST} records {listed(lost)}",
            hint="copy its files again, or leave the state out with --no-optimizer",
            missing=lost,
        )


def _in_manifest(content: Content) -> Mapping[str, str]:
    manifest = find_manifest(content.folder)
    return manifest.optimizer if manifest else {}
