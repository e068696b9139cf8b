"""A checkpoint beside its reference, before either computes: the same model, the same config, the same tensors.

The few tokens that models are run on reach neither every row of an embedding nor a window beyond their number.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from plans.errors import UsageError
from runtime.checkpoint.content import Content
from runtime.models.model import meta_model, model_tensors, read_config
from runtime.parallel.mismatch import Mismatch
from runtime.processes.agreement import together
from runtime.validation.content import shared_digests
from runtime.validation.reference import config_in, of_reference
from runtime.validation.source import read_source
from runtime.validation.values import Check
from runtime.wording import listed

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["check_reference", "compare_configs", "compare_tensors"]

_NOT_COMPUTED_BY = frozenset(
    {
        *("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"),
        *("bos_token_id", "eos_token_id", "initializer_range", "use_cache"),
        *("id2label", "label2id", "output_attentions", "output_hidden_states", "output_router_logits", "return_dict"),
        "router_aux_loss_coef",
    }
)
"""Entries of a config that change no output, gradient or greedy token."""


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
    tables = [read_config(one).to_dict() for one in (folder, reference)]
    # What only one of them has at the top its class does not know, and fills what it knows in with its defaults.
    known = (tables[0].keys() & tables[1].keys()) - _NOT_COMPUTED_BY
    found, expected = (dict(_entries({key: table[key] for key in table if key in known})) for table in tables)
    return [
        Mismatch(f"config.json: {key}", f"{expected.get(key)!r}, as in the reference", repr(found.get(key)))
        for key in dict.fromkeys([*found, *expected])
        if found.get(key) != expected.get(key)
    ]


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


def _entries(table: Mapping[str, object], above: str = "") -> Iterator[tuple[str, object]]:
    """Yield what a config says, that of the tables in it too, by dotted names."""
    for key, value in table.items():
        if isinstance(value, Mapping):
            inside = {name: one for name, one in value.items() if name not in _NOT_COMPUTED_BY}
            yield from _entries(inside, f"{above}{key}.")
        else:
            yield f"{above}{key}", list(value) if isinstance(value, tuple) else value


def _shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model_tensors(model).items()}


def _vocabulary(config: PreTrainedConfig) -> int | None:
    return getattr(config.get_text_config(), "vocab_size", None)


def _another(what: str) -> UsageError:
    return UsageError(what, hint="give the checkpoint that the folder was laid out from as the reference, or none")
