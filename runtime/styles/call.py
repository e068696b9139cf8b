"""A call's arguments by place, so that a style can change some of them and hand on the rest as they came."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from runtime.styles.collectives import all_reduce_gradient, all_reduce_gradients

__all__ = ["ArgumentKey", "SharedInputs", "index_arguments", "split_arguments", "sum_argument_gradients"]


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


class SharedInputs:
    """The tensors that parts of one module were given during one of its calls, each with its gradient summed.

    Several column-wise layers of one input each leave a partial gradient of it on each rank. Where all of them get
    the same summed tensor, autograd adds these up on the rank, and one all-reduce sums the ranks. Nothing is held
    when the module's call is over, and outside of one each layer sums by itself.
    """

    def __init__(self) -> None:
        self._summed_tensors: dict[tuple[int, int, int], tuple[torch.Tensor, torch.Tensor]] | None = None

    def sum_gradient(self, tensor: torch.Tensor, axis: DeviceMesh) -> torch.Tensor:
        """Return a whole tensor as it is, its gradient summed over the axis, together with that of other calls."""
        if self._summed_tensors is None or not (torch.is_grad_enabled() and tensor.requires_grad):
            return all_reduce_gradient(tensor, axis)
        # The version tells a tensor from what it was before something changed it in place.
        key = (id(tensor), tensor._version, id(axis))
        if key not in self._summed_tensors:
            # The tensor is kept too, so that no other takes its id during the call.
            self._summed_tensors[key] = tensor, all_reduce_gradient(tensor, axis)
        return self._summed_tensors[key][1]

    def wrap_forward(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Return the forward of the module whose calls these are."""

        @functools.wraps(forward)
        def call(*args: object, **kwargs: object) -> object:
            outer, self._summed_tensors = self._summed_tensors, {}
            try:
                return forward(*args, **kwargs)
            finally:
                self._summed_tensors = outer

        return call
