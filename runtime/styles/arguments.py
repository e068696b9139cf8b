"""A call's arguments by place, so that a style can change some of them and hand on the rest as they came."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch.distributed.device_mesh import DeviceMesh

from runtime.styles.collectives import all_reduce_gradients

__all__ = ["Place", "by_place", "called", "with_summed_gradients"]

Place = int | str
"""The position or the name of an argument."""


def by_place(args: Sequence[object], kwargs: Mapping[str, object]) -> dict[Place, object]:
    """Return a call's arguments by place, positional ones first."""
    values: dict[Place, object] = dict(enumerate(args))
    return values | dict(kwargs)


def called(values: Mapping[Place, object], positional: int) -> tuple[list[object], dict[str, object]]:
    """Return arguments by place as positional and named ones.

    Args:
        values: by place.
        positional: how many of them have positions.
    """
    named = {place: value for place, value in values.items() if isinstance(place, str)}
    return [values[place] for place in range(positional)], named


def with_summed_gradients(
    values: Mapping[Place, object], axis: DeviceMesh, kept: Place | None = None
) -> dict[Place, object]:
    """Return arguments with every tensor's gradient summed over a mesh axis, in one collective.

    Args:
        values: by place.
        axis: the mesh axis.
        kept: the place of a tensor whose gradient is whole already, None where there is no such.
    """
    tensors = {place: value for place, value in values.items() if isinstance(value, torch.Tensor) and place != kept}
    return {**values, **dict(zip(tensors, all_reduce_gradients(tuple(tensors.values()), axis), strict=True))}
