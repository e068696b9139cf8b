"""Reading what a checkpoint of whatever layout holds of a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from runtime.checkpoint.content import Checkpoint
from runtime.checkpoint.dcp.content import read_dcp_checkpoint
from runtime.checkpoint.foreign.content import read_external
from runtime.checkpoint.foreign.source import ExternalSettings
from runtime.checkpoint.hub.content import build_hub_checkpoint
from runtime.checkpoint.hub.hf import read_hub
from runtime.checkpoint.layout import detect_layout
from runtime.checkpoint.of_model import check_matches_model
from runtime.checkpoint.ranks.files import RankCheckpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["read_checkpoint"]


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
