"""How exactly two models are compared: in float64 where both fit in memory, else in float32.

Model code casts to float32 in norms, routers and softmaxes, where differences of 1e-16 become roundings of 1e-7. So in
float64 both models compute these in float64 too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from runtime.processes.agreement import all_gather_json
from runtime.validation.local import fits_in_memory

__all__ = ["FLOAT32", "FLOAT64", "Precision", "choose_precision"]


@dataclass(frozen=True)
class Precision:
    """A dtype that both models compute in, and how far apart they may be.

    Args:
        dtype: the dtype.
        name: its name.
        output_tolerance: the accepted difference of outputs, relative to the largest.
        gradient_factor: how many times that tolerance gradients get, relative to the parameter's own largest.
        gradient_floor: parameters whose gradients are smaller than this fraction of the model's largest are compared
            relative to that fraction. Some gradients, such as that of a bias on keys, are zero up to rounding, so their
            own size is no scale to compare with.
    """

    dtype: torch.dtype
    name: str
    output_tolerance: float
    gradient_factor: float
    gradient_floor: float

    def tolerance(self, requested: float | None) -> float:
        """Return the tolerance of outputs.

        Args:
            requested: the user's, None for the default of this precision.
        """
        return self.output_tolerance if requested is None else requested

    def describe_gradients(self, requested: float | None) -> Mapping[str, Any]:
        """Return the numbers with which gradients are compared, by the names that results give them."""
        return {
            "precision": self.name,
            "tolerance": self.gradient_factor * self.tolerance(requested),
            "floor": self.gradient_floor,
        }

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Let models compute in the dtype throughout, whatever their code casts to."""
        if self.dtype != torch.float64:
            yield
            return
        with _WideningMode():
            yield


class _WideningMode(TorchFunctionMode):
    """Reads float64 wherever float32 is asked for."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        widened = [_widen(value) for value in args]
        return func(*widened, **{name: _widen(value) for name, value in (kwargs or {}).items()})


def _widen(value: object) -> object:
    return torch.float64 if value is torch.float32 else value


# With this floor, differences of 1e-14 of the largest gradient are rounding: gradients that cancel, such as that of a
# router with one expert for each token, are 1e-16 of it. One of 1e-8 of the largest is still compared to six digits.
FLOAT64 = Precision(torch.float64, "float64", 1e-10, 1.0, 1e-4)
FLOAT32 = Precision(torch.float32, "float32", 1e-5, 10.0, 1e-2)
"""Gradients get more, for they pass each layer twice and add up over tokens."""


def choose_precision(model: nn.Module, device: torch.device) -> Precision:
    """Return the most exact precision in which both models fit in every rank's memory. Collective.

    Args:
        model: the rank's model; only the sizes of its parameters matter.
        device: the device that this rank computes on.
    """
    fits: list[bool] = all_gather_json(fits_in_memory(model, device, torch.float64))
    return FLOAT64 if all(fits) else FLOAT32
