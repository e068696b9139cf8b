"""A call's arguments by key, so that a style can replace some and pass on the others, and inputs that calls share."""

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
    """Return a call's arguments by key, positional ones first."""
    values: dict[ArgumentKey, object] = dict(enumerate(args))
    return values | dict(kwargs)


def split_arguments(
    arguments: Mapping[ArgumentKey, object], positional_count: int
) -> tuple[list[object], dict[str, object]]:
    """Split a call's arguments into positional and named ones, the reverse of `index_arguments`.

    Args:
        arguments: the arguments by key.
        positional_count: the number of positional arguments.
    """
    named = {key: value for key, value in arguments.items() if isinstance(key, str)}
    return [arguments[position] for position in range(positional_count)], named


def sum_argument_gradients(
    arguments: Mapping[ArgumentKey, object], axis: DeviceMesh, excluded: ArgumentKey | None = None
) -> dict[ArgumentKey, object]:
    """Return the arguments, with every tensor's gradient summed over a mesh axis in one collective.

    Args:
        arguments: the arguments by key.
        axis: the mesh axis.
        excluded: the key of a tensor whose gradient is whole already, None if there is none.
    """
    tensors = {key: value for key, value in arguments.items() if isinstance(value, torch.Tensor) and key != excluded}
    return {**arguments, **dict(zip(tensors, all_reduce_gradients(tuple(tensors.values()), axis), strict=True))}


class SharedInputs:
    """The tensors that the layers of one module receive during one of its calls, each with its gradient summed once.

    Several column-wise layers of one input each leave a partial gradient of it on each rank. If all of them receive
    the same summed tensor, autograd adds these gradients on the rank, and one all-reduce sums over the ranks. No tensor
    is kept after the module's call, and outside of such a call each layer sums by itself.
    """

    def __init__(self) -> None:
        self._summed_tensors: dict[tuple[int, int, int], tuple[torch.Tensor, torch.Tensor]] | None = None

    def sum_gradient(self, tensor: torch.Tensor, axis: DeviceMesh) -> torch.Tensor:
        """Return a whole tensor unchanged, with one summed gradient for all layers that receive it."""
        if self._summed_tensors is None or not (torch.is_grad_enabled() and tensor.requires_grad):
            return all_reduce_gradient(tensor, axis)
        # The version tells a tensor from its value before a change in place.
        key = (id(tensor), tensor._version, id(axis))
        if key not in self._summed_tensors:
            # The tensor is kept too, so that no other tensor takes its id during the call.
            self._summed_tensors[key] = tensor, all_reduce_gradient(tensor, axis)
        return self._summed_tensors[key][1]

    def wrap_forward(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Return a module's forward, during whose calls its layers share their inputs."""

        @functools.wraps(forward)
        def call(*args: object, **kwargs: object) -> object:
            outer, self._summed_tensors = self._summed_tensors, {}
            try:
                return forward(*args, **kwargs)
            finally:
                self._summed_tensors = outer

        return call
