"""A call's arguments by place, so that a style can change some of them and hand on the rest as they came."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch.distributed.device_mesh import DeviceMesh

from runtime.styles.collectives import all_reduce_gradients

__all__ = ["ArgumentKey", "index_arguments", "split_arguments", "sum_argument_gradients"]

ArgumentKey = int | str
"""The position or the name of an argument."""


def index_arguments(args: Sequence[object], kwargs: Mapping[str, object]) -> dict[ArgumentKey, object]:
    """Return a call's arguments by place, positional ones first."""
    values: dict[ArgumentKey, object] = dict(enumerate(args))
    return values | dict(kwargs)


def split_arguments(
    arguments: Mapping[ArgumentKey, object], positional_count: int
) -> tuple[list[object], dict[str, object]]:
    """Return arguments by place as positional and named ones.

    Args:
        arguments: by place.
        positional_count: how many of them have positions.
    """
    named = {place: value for place, value in arguments.items() if isinstance(place, str)}
    return [arguments[place] for place in range(positional_count)], named


def sum_argument_gradients(
    arguments: Mapping[ArgumentKey, object], axis: DeviceMesh, excluded: ArgumentKey | None = None
) -> dict[ArgumentKey, object]:
    """Return arguments with every tensor's gradient summed over a mesh axis, in one collective.

    Args:
        arguments: by place.
        axis: the mesh axis.
        excluded: the place of a tensor whose gradient is whole already, None where there is no such.
    """
    tensors = {
        place: value for place, value in arguments.items() if isinstance(value, torch.Tensor) and place != excluded
    }
    return {**arguments, **dict(zip(tensors, all_reduce_gradients(tuple(tensors.values()), axis), strict=True))}
