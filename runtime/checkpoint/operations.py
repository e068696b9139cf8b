"""transformers' weight operations, done on forms instead of tensors.

Each function does to forms what the operation of the same name does to tensors, and gives its results the same
names. Operations that are not in the table are refused by name, never approximated.

Source: `transformers.core_model_loading` of transformers 5.23.0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from runtime.checkpoint.extents import Form, FormError, chunk, concatenate, split, stack, transpose, unbind

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from transformers.core_model_loading import ConversionOps

__all__ = ["OPERATIONS", "Collected", "Context"]

Collected = dict[str, list[Form]]
"""Forms by the pattern of names that they came from or go to."""


@dataclass(frozen=True)
class Context:
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
        """Return the shape of the tensor that a target pattern means in this layer."""
        name = self.layer.replace(self.targets[0], target)
        if name not in self.shapes:
            raise FormError(f"the model has no {name}")
        return self.shapes[name]


def _merge_modulelist(operation: ConversionOps, collected: Collected, context: Context) -> Collected:
    alone = len(collected) == 1
    return {
        _one(context.targets) if alone else source: [stack(forms, operation.dim)] for source, forms in collected.items()
    }


def _split_modulelist(operation: ConversionOps, collected: Collected, context: Context) -> Collected:
    result: Collected = {}
    for source, forms in collected.items():
        pattern = _one(context.targets) if len(collected) == 1 else source
        pieces = unbind(forms[0], operation.dim)
        result |= {pattern.replace("*", str(index)): [piece] for index, piece in enumerate(pieces)}
    return result


def _concatenate(operation: ConversionOps, collected: Collected, context: Context) -> Collected:
    ordered = [form for source in context.sources for form in collected.get(source, [])]
    return {_one(context.targets): [concatenate(ordered, operation.dim)]}


def _chunk(operation: ConversionOps, collected: Collected, context: Context) -> Collected:
    targets = context.targets
    if operation.num_shards_attribute is not None:
        count = getattr(context.config.get_text_config(), operation.num_shards_attribute)
        targets = [_one(targets).replace("*", str(index)) for index in range(count)]
    pieces = chunk(_only(collected), len(targets), operation.dim)
    if len(pieces) != len(targets):
        raise FormError(f"{len(pieces)} chunks for {len(targets)} targets")
    return {target: [piece] for target, piece in zip(targets, pieces, strict=True)}


def _split(operation: ConversionOps, collected: Collected, context: Context) -> Collected:
    sizes = [context.target_shape(target)[operation.dim] for target in context.targets]
    pieces = split(_only(collected), sizes, operation.dim)
    return {target: [piece] for target, piece in zip(context.targets, pieces, strict=True)}


def _transpose(operation: ConversionOps, collected: Collected, context: Context) -> Collected:
    form = _only(collected)
    # First of a chain that ends in several targets: the name stays the source's.
    target = context.targets[0] if len(context.targets) == 1 else _one(context.sources)
    if getattr(operation, "check_dims", False) and form.shape == context.shapes.get(context.layer):
        return {target: [form]}
    return {target: [transpose(form, operation.dim0, operation.dim1)]}


def _one(patterns: Sequence[str]) -> str:
    if len(patterns) != 1:
        raise FormError(f"{len(patterns)} patterns where the operation is defined for one")
    return patterns[0]


def _only(collected: Collected) -> Form:
    forms = [form for group in collected.values() for form in group]
    if len(forms) != 1:
        raise FormError(f"{len(forms)} tensors where the operation is defined for one")
    return forms[0]


OPERATIONS: Mapping[str, Callable[[ConversionOps, Collected, Context], Collected]] = {
    "Chunk": _chunk,
    "Concatenate": _concatenate,
    "MergeModulelist": _merge_modulelist,
    "Split": _split,
    "SplitModulelist": _split_modulelist,
    "Transpose": _transpose,
}
"""By class name; the classes of `transformers.core_model_loading` only."""
