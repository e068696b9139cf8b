"""Reading a checkpoint of whatever layout: which one it is, and what it holds of a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from runtime.checkpoint.content import Content, Layout
from runtime.checkpoint.hf import read_hub
from runtime.checkpoint.hub_content import hub_content
from runtime.checkpoint.ranks import RankCheckpoint
from runtime.checkpoint.record import MANIFEST

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["layout_of", "read_content"]


def layout_of(folder: Path) -> Layout:
    """Return how a checkpoint lies in a folder, by the names of its files; hub form where nothing says otherwise."""
    return "ranks" if (folder / MANIFEST).is_file() else "hf"


def read_content(folder: Path, model: PreTrainedModel) -> Content:
    """Read what a checkpoint holds of a model, no tensor.

    Args:
        folder: of the checkpoint.
        model: that its config describes, on meta.

    Raises:
        CheckpointError: it is damaged, incomplete or of another model.
        UsageError: it is quantized.
    """
    if layout_of(folder) == "ranks":
        return RankCheckpoint.read(folder).content()
    return hub_content(read_hub(folder), model)
