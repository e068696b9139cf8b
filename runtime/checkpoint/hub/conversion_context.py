"""What transformers' weight operations are given: forms by pattern, and what they may ask about their converter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from runtime.tensor_map.tensor_map import TensorMap, TensorMapError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["ConversionContext", "PatternMaps", "get_only_map", "get_only_pattern"]

PatternMaps = dict[str, list[TensorMap]]
"""Forms by the pattern of names that they came from or go to."""


@dataclass(frozen=True)
class ConversionContext:
    """What an operation may ask about the converter that runs it.

    Args:
        sources: the converter's source patterns.
        targets: its target patterns.
        layer: the first target's full name in the model.
        shapes: of the model's tensors by full name.
        config: the model's config.
    """

    sources: Sequence[str]
    targets: Sequence[str]
    layer: str
    shapes: Mapping[str, tuple[int, ...]]
    config: PreTrainedConfig

    def target_shape(self, target: str) -> tuple[int, ...]:
        """Return the shape of the tensor that a target pattern means in this layer.

        Raises:
            FormError: the model has no such tensor.
        """
        name = self.layer.replace(self.targets[0], target)
        if name not in self.shapes:
            raise TensorMapError(f"the model has no {name}")
        return self.shapes[name]

    def get_single_name(self) -> str:
        """Return the name that an operation on one tensor gives it.

        First of a chain that ends in several targets, it leaves the source's.

        Raises:
            FormError: there are several patterns on the side that it takes the name from.
        """
        return get_only_pattern(self.targets if len(self.targets) == 1 else self.sources)


def get_only_pattern(patterns: Sequence[str]) -> str:
    """Return the only pattern.

    Raises:
        FormError: there are several.
    """
    if len(patterns) != 1:
        raise TensorMapError(f"{len(patterns)} patterns where the operation is defined for one")
    return patterns[0]


def get_only_map(collected: PatternMaps) -> TensorMap:
    """Return the only form.

    Raises:
        FormError: there are several.
    """
    forms = [form for group in collected.values() for form in group]
    if len(forms) != 1:
        raise TensorMapError(f"{len(forms)} tensors where the operation is defined for one")
    return forms[0]
