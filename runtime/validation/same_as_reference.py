"""A checkpoint beside its reference, before either computes: the same model, the same config, the same tensors.

The few tokens that models are run on reach neither every row of an embedding nor a window beyond their number.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from plans.errors import UsageError
from runtime.checkpoint.config_record import CONFIG, config_changes, read_entries
from runtime.checkpoint.content import Content
from runtime.models.config_entries import Differing, compare_entries
from runtime.models.model import meta_model, model_tensors
from runtime.parallel.mismatch import Mismatch
from runtime.processes.agreement import together
from runtime.validation.content import shared_digests
from runtime.validation.reference import config_in, of_reference
from runtime.validation.source import read_source
from runtime.validation.values import Check
from runtime.wording import listed

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["check_reference", "compare_configs", "compare_record", "compare_tensors"]


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
    config = config_in(reference, torch.float32)
    for what, found, expected in (
        ("model type", config.model_type, model.config.model_type),
        ("vocabulary", _vocabulary(config), _vocabulary(model.config)),
    ):
        if found != expected:
            raise _another(f"{reference}: the reference's {what} is {found}, that of {folder} is {expected}")
    other = meta_model(config)
    if type(other) is not type(model):
        return  # which the outputs tell
    shapes, wanted = _shapes(other), _shapes(model)
    if unlike := sorted(name for name in shapes.keys() | wanted.keys() if shapes.get(name) != wanted.get(name)):
        raise _another(f"{reference}: by its config the reference has not the tensors of {folder}: {listed(unlike)}")


def compare_configs(folder: Path, reference: Path) -> list[Mismatch]:
    """Return the entries of config.json by which the folder's model would compute something else than the reference's.

    Raises:
        CheckpointError: a config cannot be read.
    """
    found, expected = (read_entries(one) or {} for one in (folder, reference))
    return [_mismatch(one, "as in the reference") for one in compare_entries(found, expected)]


def compare_record(content: Content) -> list[Mismatch]:
    """Return the entries of config.json by which the model would compute something else than what was laid out.

    Raises:
        CheckpointError: the config cannot be read.
    """
    return [_mismatch(one, "as when it was laid out") for one in config_changes(content)]


def _mismatch(one: Differing, why: str) -> Mismatch:
    return Mismatch(f"{CONFIG}: {one.key}", f"{one.expected}, {why}", one.found)


def compare_tensors(check: Check, content: Content, reference: Path) -> Check:
    """Add to a content check in which tensors the checkpoint differs from the reference; every rank calls this.

    Tensors that the reference stores in another type cannot be compared byte by byte, and are not.

    Args:
        check: of the checkpoint's own digests, which ranks hold.
        content: of the checkpoint.
        reference: of whatever layout; all bytes of it are read, which ranks share.

    Raises:
        CheckpointError: the reference cannot be read.
    """
    with of_reference():
        other = together(lambda: read_source(reference))
        names = [name for name, held in content.tensors.items() if other.tensors.get(name) == held]
        expected = shared_digests(other, names)
    found = content.digests or shared_digests(content, names)
    wrong = [
        Mismatch(name, f"digest {expected[name]}, as in the reference", f"digest {found[name]}")
        for name in names
        if found[name] != expected[name]
    ]
    numbers = {"compared": len(names), "different": len(wrong)}
    return replace(check, mismatches=(*check.mismatches, *wrong), numbers={**check.numbers, "with_reference": numbers})


def _shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model_tensors(model).items()}


def _vocabulary(config: PreTrainedConfig) -> int | None:
    return getattr(config.get_text_config(), "vocab_size", None)


def _another(what: str) -> UsageError:
    return UsageError(what, hint="give the checkpoint that the folder was laid out from as the reference, or none")
