"""Reading a checkpoint of whatever layout: which one it is, and what it holds of a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from runtime.checkpoint.content import Content, Layout
from runtime.checkpoint.dcp.content import dcp_content
from runtime.checkpoint.dcp.metadata import METADATA
from runtime.checkpoint.dcp.safetensors import shard_files
from runtime.checkpoint.files.reading import reading
from runtime.checkpoint.foreign.content import foreign_content
from runtime.checkpoint.foreign.source import Foreign
from runtime.checkpoint.hub.content import hub_content
from runtime.checkpoint.hub.hf import INDEX, WEIGHTS, read_hub
from runtime.checkpoint.of_model import check_of_model
from runtime.checkpoint.ranks.files import RankCheckpoint
from runtime.checkpoint.ranks.record import MANIFEST

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["layout_of", "read_content"]


def layout_of(folder: Path) -> Layout:
    """Return how a checkpoint lies in a folder, by the names of its files; hub form where nothing says otherwise."""
    with reading(folder):
        if folder.is_dir() and shard_files(folder):
            return "dcp"
    if (folder / MANIFEST).is_file():
        return "ranks"
    is_hub = any((folder / name).exists() for name in (WEIGHTS, INDEX))
    return "dcp" if (folder / METADATA).is_file() and not is_hub else "hf"


def read_content(folder: Path, model: PreTrainedModel, foreign: Foreign | None = None) -> Content:
    """Read what a checkpoint holds of a model, no tensor but those that must be the same in several places.

    Args:
        folder: of the checkpoint.
        model: that its config describes, on meta.
        foreign: how to read another stack's rank files, where it is made of such.

    Raises:
        CheckpointError: it is damaged, incomplete or of another model.
        MismatchError: its tensors are not the model's.
        UsageError: it is quantized.
        PlanError: the plan of foreign rank files does not go with the model.
    """
    content = foreign_content(folder, model, foreign) if foreign else _content(folder, model)
    check_of_model(content, model)
    return content


def _content(folder: Path, model: PreTrainedModel) -> Content:
    match layout_of(folder):
        case "dcp":
            return dcp_content(folder, model)
        case "ranks":
            return RankCheckpoint.read(folder).content()
        case "hf":
            return hub_content(read_hub(folder), model)
