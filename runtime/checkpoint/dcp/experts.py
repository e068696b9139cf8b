"""Experts that each rank of an expert parallel job has numbered from 0, so that no name tells which is which."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from plans.errors import MismatchError
from plans.text import shorten
from runtime.models.model import model_tensors
from runtime.tensor_map.tensor_map import Shape

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["check_experts_numbered"]

_NUMBERED = re.compile(r"(?P<experts>.*\bexperts)\.(?P<number>[0-9]{1,6})\..+")
_STACKED = re.compile(r".*\bexperts\..+")
_EXPERT_DIMS = 3


def check_experts_numbered(folder: Path, stored: Mapping[str, Shape], model: PreTrainedModel) -> None:
    """Refuse a checkpoint with a part of the experts, as when every rank saves its own as if there were no others.

    Such ranks save different tensors under one name. torch's writer keeps those of one rank, without an error.

    Args:
        folder: the checkpoint's folder.
        stored: the shapes of the saved tensors by name.
        model: the model, on meta.

    Raises:
        MismatchError: the model's number of experts is a multiple of the number that is stored.
    """
    stacked = {
        name: tuple(tensor.shape)
        for name, tensor in model_tensors(model).items()
        if tensor.ndim == _EXPERT_DIMS and _STACKED.fullmatch(name)
    }
    totals = {name.rpartition(".")[0]: shape[0] for name, shape in stacked.items()}
    numbers: dict[str, set[int]] = {}
    for name, shape in stored.items():
        if match := _NUMBERED.fullmatch(name):
            numbers.setdefault(match["experts"], set()).add(int(match["number"]))
        elif name in stacked and len(shape) == _EXPERT_DIMS and shape[1:] == stacked[name][1:]:
            _check_count(folder, name, shape[0], stacked[name][0])
    if totals.keys().isdisjoint(numbers) and len(set(totals.values())) == 1:  # the hub form has another name for them
        totals = dict.fromkeys(numbers, max(totals.values()))
    for experts in numbers.keys() & totals.keys():
        if numbers[experts] == set(range(len(numbers[experts]))):
            _check_count(folder, experts, len(numbers[experts]), totals[experts])


def _check_count(folder: Path, name: str, count: int, total: int) -> None:
    if 0 < count < total and total % count == 0:
        raise MismatchError(
            f"{folder}: {shorten(repr(name))} are {count} experts, but the model has {total}: so it is when each of "
            f"{total // count} ranks numbers its own from 0, and their tensors have the same names",
            hint="give every expert its number in the whole model when the ranks save, such as "
            "`first_expert_of_the_rank + i`; what one rank saved over another's is not in these files",
            count=count,
            expected=total,
        )
