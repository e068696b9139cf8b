"""Compare a checkpoint with its reference before either computes: the same model, config and tensors.

The few tokens that models run on reach neither every row of an embedding nor a window longer than they are.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from plans.errors import UsageError
from plans.text import format_names
from runtime.checkpoint.checkpoint import Checkpoint, find_config_changes, read_config_entries
from runtime.checkpoint.files.file_names import CONFIG
from runtime.checkpoint.open import open_checkpoint
from runtime.models.config_entries import ConfigDifference, compare_entries
from runtime.models.model import meta_model, model_tensors
from runtime.parallel.mismatch import Mismatch
from runtime.processes.agreement import raise_on_any_rank
from runtime.validation.content import gather_file_digests
from runtime.validation.reference import convert_reference_errors, read_config_with_dtype
from runtime.validation.results import CheckResult

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["check_reference", "compare_configs", "compare_recorded_config", "compare_tensors"]


def check_reference(folder: Path, reference: Path, model: PreTrainedModel) -> None:
    """Refuse a reference that is another model by its config alone, before it runs on the folder's tokens.

    Args:
        folder: the checkpoint's folder.
        reference: the reference's folder.
        model: the checkpoint's model, on meta.

    Raises:
        UsageError: the reference is another model, or quantized.
        CheckpointError: the reference's config cannot be read.
    """
    config = read_config_with_dtype(reference, torch.float32)
    for what, found, expected in (
        ("model type", config.model_type, model.config.model_type),
        ("vocabulary", _get_vocabulary_size(config), _get_vocabulary_size(model.config)),
    ):
        if found != expected:
            raise _other_model_error(
                f"{reference}: the reference's {what} is {found}, but that of {folder} is {expected}"
            )
    other = meta_model(config)
    if type(other) is not type(model):
        return  # their outputs are compared
    shapes, wanted = _get_shapes(other), _get_shapes(model)
    if different := sorted(name for name in shapes.keys() | wanted.keys() if shapes.get(name) != wanted.get(name)):
        raise _other_model_error(
            f"{reference}: by its config, its tensors differ from those of {folder}: {format_names(different)}"
        )


def compare_configs(folder: Path, reference: Path) -> list[Mismatch]:
    """Return the entries of config.json that make the folder's model compute something else than the reference's.

    Raises:
        CheckpointError: a config cannot be read.
    """
    own, expected = (read_config_entries(path) or {} for path in (folder, reference))
    return [_build_config_mismatch(row, "as in the reference") for row in compare_entries(own, expected)]


def compare_recorded_config(checkpoint: Checkpoint) -> list[Mismatch]:
    """Return the entries of config.json that changed, since the checkpoint was written, what the model computes.

    Raises:
        CheckpointError: the config cannot be read.
    """
    return [_build_config_mismatch(row, "as when it was written") for row in find_config_changes(checkpoint)]


def _build_config_mismatch(difference: ConfigDifference, why: str) -> Mismatch:
    return Mismatch(f"{CONFIG}: {difference.key}", f"{difference.expected}, {why}", difference.found)


def compare_tensors(check: CheckResult, checkpoint: Checkpoint, reference: Path) -> CheckResult:
    """Add the tensors in which the checkpoint differs from the reference to a content check. Collective.

    Tensors that the reference stores in another dtype cannot be compared byte by byte, and are skipped.

    Args:
        check: the content check of the checkpoint itself.
        checkpoint: the checkpoint.
        reference: the reference's folder, of any layout; the ranks together read all of its bytes.

    Raises:
        CheckpointError: the reference cannot be read.
    """
    with convert_reference_errors():
        other = raise_on_any_rank(lambda: _read_reference(reference))
        names = [name for name, tensor in checkpoint.tensors.items() if other.tensors.get(name) == tensor]
        expected = gather_file_digests(other, names)
    digests = checkpoint.digests or gather_file_digests(checkpoint, names)
    wrong = [
        Mismatch(name, f"digest {expected[name]}, as in the reference", f"digest {digests[name]}")
        for name in names
        if digests[name] != expected[name]
    ]
    numbers = {"compared": len(names), "different": len(wrong)}
    return replace(check, mismatches=(*check.mismatches, *wrong), numbers={**check.numbers, "with_reference": numbers})


def _read_reference(reference: Path) -> Checkpoint:
    reader = open_checkpoint(reference)
    return reader.read_headers(reader.naming_model)


def _get_shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model_tensors(model).items()}


def _get_vocabulary_size(config: PreTrainedConfig) -> int | None:
    return getattr(config.get_text_config(), "vocab_size", None)


def _other_model_error(what: str) -> UsageError:
    return UsageError(what, hint="pass the checkpoint that the folder was resharded from as the reference, or none")
