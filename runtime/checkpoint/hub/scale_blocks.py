"""Refusing conversions that part quantized weights from their scales.

Where gate and up have 6 rows each and blocks have 4, two halves have two scales each, but the fused matrix has three
for its 12 rows: the one in the middle is for rows of both. No copy of bytes makes one form of the other. Nor do scales
fit a weight that is transposed without them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from plans.errors import ConversionError
from plans.text import format_names
from runtime.planning.resolve import Scale
from runtime.tensor_map.tensor_map import Shape, StridedBox, TensorMap, row_major, unravel

__all__ = ["check_whole_blocks"]


@dataclass(frozen=True)
class _Cut:
    """A place where parts of a tensor meet within a block.

    Args:
        tensor: the tensor that consists of the parts, the model's or a stored one.
        shape: its shape.
        dim: the dim along which the parts follow one another.
        position: the index along the dim at which a part begins.
        width: how many elements along the dim share one scale.
    """

    tensor: str
    shape: Shape
    dim: int
    position: int
    width: int


def check_whole_blocks(
    tensor_maps: Mapping[str, TensorMap],
    scales: Mapping[str, Scale],
    stored: Mapping[str, Shape],
    shapes: Mapping[str, Shape],
) -> None:
    """Refuse conversions that cut a weight, or the stored tensors that it is made of, within a block of one scale.

    Args:
        tensor_maps: the model's tensors over the stored ones.
        scales: the model's scales by name.
        stored: the shapes of the stored tensors.
        shapes: the shapes of the model's tensors.

    Raises:
        ConversionError: a block of a weight would be split, or joined from parts of several, or a weight would be
            transposed without its scales.
    """
    for name, scale in scales.items():
        if scale.block is None or scale.weight not in tensor_maps or name not in tensor_maps:
            continue
        weight = tensor_maps[scale.weight]
        if _is_transposed(weight) and (
            _is_transposed(tensor_maps[name]) is False or tensor_maps[name].shape != shapes[name]
        ):
            raise _orientation_error(name, scale.weight, tensor_maps[name].shape, shapes[name])
        block = _find_block(weight.shape, shapes[name], scale.block)
        cut = next(_find_cuts(scale.weight, weight, block, stored), None)
        if cut is not None:
            raise _cut_error(name, scale, cut, tensor_maps[name], stored, shapes)


def _is_transposed(tensor_map: TensorMap) -> bool | None:
    """Return whether the last two dims are stored the other way round, None if the shape does not tell."""
    box = tensor_map.boxes[0] if tensor_map.boxes else None
    if box is None or len(box.strides) < 2 or box.strides[-2] == box.strides[-1]:
        return None
    return box.strides[-2] < box.strides[-1]


def _orientation_error(name: str, weight: str, found: Shape, shape: Shape) -> ConversionError:
    return ConversionError(
        f"{weight} is stored transposed, but its scales {name} are not converted with it: they are {list(shape)} in "
        f"the model and {list(found)} as stored",
        hint="use the checkpoint that it was quantized from",
        tensor=weight,
        scale=name,
    )


def _find_block(weight: Shape, scale: Shape, block: Shape) -> Shape:
    """Return how many elements share one scale.

    A fused matrix of fewer rows than a block still has two scales, one for each half.
    """
    return tuple(
        size // count if count > -(-size // width) and size % count == 0 else width
        for size, count, width in zip(weight, scale, block, strict=True)
    )


def _find_cuts(name: str, weight: TensorMap, block: Shape, stored: Mapping[str, Shape]) -> Iterator[_Cut]:
    checked: set[tuple[object, ...]] = set()  # the experts of one matrix are cut alike
    for box in weight.boxes:
        for dim, width in enumerate(block):
            if width == 1:
                continue
            shape = stored[box.source]
            source_dim, first, step = _find_range(box, dim, shape)
            start, length = box.offset[dim], box.shape[dim]
            alike = (dim, start, length, box.steps[dim], source_dim, first, step, shape)
            if alike in checked:
                continue
            checked.add(alike)
            starts = [start + 1] if box.steps[dim] > 1 else [start, start + length]
            for position in starts:
                if position % width and position != weight.shape[dim]:
                    yield _Cut(name, weight.shape, dim, position, width)
            starts = [first + 1] if step != 1 and length > 1 else [first, first + length]
            for position in starts:
                if position % width and position != shape[source_dim]:
                    yield _Cut(box.source, shape, source_dim, position, width)


def _find_range(box: StridedBox, dim: int, shape: Shape) -> tuple[int, int, int]:
    """Return the dim of a box's source that runs along one of its dims, where the box begins there, and its step."""
    strides = row_major(shape)
    along = [index for index, stride in enumerate(strides) if box.strides[dim] % stride == 0 and shape[index] > 1]
    source_dim = along[0] if along else len(shape) - 1
    return source_dim, unravel(box.base, shape)[source_dim], box.strides[dim] // strides[source_dim]


def _cut_error(
    name: str, scale: Scale, cut: _Cut, tensor_map: TensorMap, stored: Mapping[str, Shape], shapes: Mapping[str, Shape]
) -> ConversionError:
    parts = tensor_map.sources
    made_of = "is made of parts" if cut.tensor == scale.weight else f"has {scale.weight} as one of its parts"
    return ConversionError(
        f"{cut.tensor}, {list(cut.shape)}, has one scale for every {cut.width} along dim {cut.dim} but {made_of}, and "
        f"one begins at {cut.position}, within such a block: {name} is {list(shapes[name])}, and it would be made of "
        f"{format_names(parts)}, {list(stored[parts[0]])}",
        hint="use a checkpoint that stores the experts fused, as the model has them, or the one that it was quantized "
        "from",
        tensor=scale.weight,
        scale=name,
        block=cut.width,
        cut=cut.position,
        shape=list(shapes[name]),
        parts={part: list(stored[part]) for part in parts},
    )
