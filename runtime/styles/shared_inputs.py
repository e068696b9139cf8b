"""Inputs shared by modules side by side, such as attention's projections: their gradient is summed once for all."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from runtime.styles.collectives import all_reduce_gradient

__all__ = ["SharedInputs"]


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
