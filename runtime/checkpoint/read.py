"""Reading what a checkpoint of whatever layout holds of a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from runtime.checkpoint.content import Content
from runtime.checkpoint.dcp.content import dcp_content
from runtime.checkpoint.foreign.content import foreign_content
from runtime.checkpoint.foreign.source import Foreign
from runtime.checkpoint.hub.content import hub_content
from runtime.checkpoint.hub.hf import read_hub
from runtime.checkpoint.layout import layout_of
from runtime.checkpoint.of_model import check_of_model
from runtime.checkpoint.ranks.files import RankCheckpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["read_content"]


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
