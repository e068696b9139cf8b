"""A checkpoint beside its reference, before either computes: the same model, the same config, the same tensors.

The few tokens that models are run on reach neither every row of an embedding nor a window beyond their number.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from plans.errors import UsageError
from plans.text import format_names
from runtime.checkpoint.checkpoint import Checkpoint
from runtime.checkpoint.config_record import find_config_changes, read_config_entries
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
    """Refuse a reference whose config alone says that it is another model, before it meets the folder's tokens.

    Args:
        folder: of the checkpoint.
        reference: of the reference.
        model: of the checkpoint, on meta.

    Raises:
        UsageError: it is another model, or quantized.
        CheckpointError: its config cannot be read.
    """
    config = read_config_with_dtype(reference, torch.float32)
    for what, found, expected in (
        ("model type", config.model_type, model.config.model_type),
        ("vocabulary", _get_vocabulary_size(config), _get_vocabulary_size(model.config)),
    ):
        if found != expected:
            raise _other_model_error(f"{reference}: the reference's {what} is {found}, that of {folder} is {expected}")
    other = meta_model(config)
    if type(other) is not type(model):
        return  # which the outputs tell
    shapes, wanted = _get_shapes(other), _get_shapes(model)
    if unlike := sorted(name for name in shapes.keys() | wanted.keys() if shapes.get(name) != wanted.get(name)):
        raise _other_model_error(
            f"{reference}: by its config the reference has not the tensors of {folder}: {format_names(unlike)}"
        )


def compare_configs(folder: Path, reference: Path) -> list[Mismatch]:
    """Return the entries of config.json by which the folder's model would compute something else than the reference's.

    Raises:
        CheckpointError: a config cannot be read.
    """
    found, expected = (read_config_entries(one) or {} for one in (folder, reference))
    return [_build_config_mismatch(one, "as in the reference") for one in compare_entries(found, expected)]


def compare_recorded_config(checkpoint: Checkpoint) -> list[Mismatch]:
    """Return the entries of config.json by which the model would compute something else than what was laid out.

    Raises:
        CheckpointError: the config cannot be read.
    """
    return [_build_config_mismatch(one, "as when it was laid out") for one in find_config_changes(checkpoint)]


def _build_config_mismatch(difference: ConfigDifference, why: str) -> Mismatch:
    return Mismatch(f"{CONFIG}: {difference.key}", f"{difference.expected}, {why}", difference.found)


def compare_tensors(check: CheckResult, checkpoint: Checkpoint, reference: Path) -> CheckResult:
    """Add to a content check in which tensors the checkpoint differs from the reference; every rank calls this.

    Tensors that the reference stores in another type cannot be compared byte by byte, and are not.

    Args:
        check: of the checkpoint's own digests, which ranks hold.
        checkpoint: of the checkpoint.
        reference: of whatever layout; all bytes of it are read, which ranks share.

    Raises:
        CheckpointError: the reference cannot be read.
    """
    with convert_reference_errors():
        other = raise_on_any_rank(lambda: open_checkpoint(reference).read_headers())
        names = [name for name, held in checkpoint.tensors.items() if other.tensors.get(name) == held]
        expected = gather_file_digests(other, names)
    found = checkpoint.digests or gather_file_digests(checkpoint, names)
    wrong = [
        Mismatch(name, f"digest {expected[name]}, as in the reference", f"digest {found[name]}")
        for name in names
        if found[name] != expected[name]
    ]
    numbers = {"compared": len(names), "different": len(wrong)}
    return replace(check, mismatches=(*check.mismatches, *wrong), numbers={**check.numbers, "with_reference": numbers})


def _get_shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model_tensors(model).items()}


def _get_vocabulary_size(config: PreTrainedConfig) -> int | None:
    return getattr(config.get_text_config(), "vocab_size", None)


def _other_model_error(what: str) -> UsageError:
    return UsageError(what, hint="give the checkpoint that the folder was laid out from as the reference, or none")
