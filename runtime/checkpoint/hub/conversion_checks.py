"""What must be true of stored tensors that become a model's: series without gaps, none missing, shapes that fit."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from plans.errors import ConversionError, IncompleteError, MismatchError
from runtime.extents.forms import TensorMap
from runtime.wording import format_names

__all__ = ["check_series", "check_tensor_maps", "conflict_error"]

_MAX_MISFITS = 3
"""How many misfits a message spells out."""


def check_series(names: Sequence[str], layer: str) -> None:
    """Refuse a numbered series with gaps: merging it would shift every tensor behind the gap.

    Args:
        names: of the stored tensors, in natural order.
        layer: the tensor of the model that they make.

    Raises:
        IncompleteError: there is a gap.
        ConversionError: the names differ in more than a number.
    """
    if len(names) < 2:
        return
    parts = [re.split(r"(\d+)", name) for name in names]
    varying = [index for index, values in enumerate(zip(*parts, strict=False)) if len(set(values)) > 1]
    if len({len(part) for part in parts}) > 1 or len(varying) != 1 or not parts[0][varying[0]].isdigit():
        raise conflict_error(layer, names)
    numbers = [int(part[varying[0]]) for part in parts]
    for expected, number in enumerate(numbers):
        if number != expected:
            missing = "".join([*parts[0][: varying[0]], str(expected), *parts[0][varying[0] + 1 :]])
            raise IncompleteError(
                f"{missing} is missing from the series that makes {layer}",
                hint="the checkpoint is incomplete; download or save it again",
                missing=[missing],
            )


def check_tensor_maps(
    tensor_maps: Mapping[str, TensorMap], origins: Mapping[str, list[str]], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Refuse a model that lacks tensors, and tensors that are not the model's size, each by name.

    Args:
        tensor_maps: what stored tensors make, by name in the model.
        origins: the stored tensors that make each.
        shapes: of the model's tensors.

    Raises:
        IncompleteError: a tensor is stored nowhere.
        MismatchError: a tensor has another shape than the model's.
    """
    missing = [name for name in shapes if name not in tensor_maps]
    if missing:
        raise IncompleteError(
            f"{format_names(missing)} of the model are stored nowhere",
            hint="the checkpoint is incomplete or config.json belongs to another model",
            missing=missing,
        )
    wrong = [name for name, shape in shapes.items() if tensor_maps[name].shape != shape]
    if wrong:
        raise MismatchError(
            "; ".join(
                _describe_misfit(name, tensor_maps[name], origins[name], shapes[name]) for name in wrong[:_MAX_MISFITS]
            )
            + (f"; and {len(wrong) - _MAX_MISFITS} more" if len(wrong) > _MAX_MISFITS else ""),
            hint="config.json does not belong to these weights, or some are missing",
            names=wrong,
            expected={name: list(shapes[name]) for name in wrong},
            found={name: list(tensor_maps[name].shape) for name in wrong},
        )


def _describe_misfit(name: str, tensor_map: TensorMap, sources: Sequence[str], shape: tuple[int, ...]) -> str:
    return f"{name} is {list(shape)} in the model but {format_names(sources)} give {list(tensor_map.shape)}"


def conflict_error(name: str, tensors: Sequence[str]) -> ConversionError:
    """Return the error of a tensor of the model that several stored ones claim."""
    return ConversionError(
        f"{name} is stored more than once: {format_names(tensors)}",
        hint="the checkpoint holds one tensor in two forms; save it again with transformers",
        name=name,
        tensors=list(tensors),
    )
