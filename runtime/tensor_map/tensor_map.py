"""Tensor maps: where the elements of a tensor lie in other tensors, in integers alone.

A tensor map describes how a tensor is made of others: its boxes are affine views of source tensors. Every step from
stored tensors to a rank's local tensors (merging experts, concatenating gate and up, sharding) is an operation on
tensor maps, so that steps compose and no byte is copied before all of them are known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import NamedTuple

from plans.placement import Packed, Placement, Replicate, Shard

__all__ = [
    "Shape",
    "StridedBox",
    "TensorMap",
    "TensorMapError",
    "chunk",
    "chunk_bounds",
    "concatenate",
    "narrow",
    "permute",
    "reassemble",
    "row_major",
    "shard_for_rank",
    "split",
    "stack",
    "transpose",
    "unbind",
    "unravel",
    "whole",
]


Shape = tuple[int, ...]
"""The sizes of a tensor, or an offset in one, per tensor dim."""


class TensorMapError(ValueError):
    """An operation is not defined for tensors of these shapes; callers add the tensors' names.

    Every function below that takes a dim, a range, sizes or an order raises it if they do not fit the tensor map.
    """


class StridedBox(NamedTuple):
    """One box of a tensor, or a regular grid in one, as an affine view of a source.

    Args:
        offset: where the box begins in the tensor, per tensor dim.
        shape: the number of elements per tensor dim, never zero.
        steps: the distance of the elements along each tensor dim, 1 if the box has no gaps.
        source: the name of the tensor that stores the elements.
        base: the flat row-major index of the source element at the box's first corner.
        strides: the source elements per step along each tensor dim.
    """

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    steps: tuple[int, ...]
    source: str
    base: int
    strides: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TensorMap:
    """A tensor's shape and the boxes that make it up; together they cover it exactly once."""

    shape: tuple[int, ...]
    boxes: tuple[StridedBox, ...]

    @property
    def sources(self) -> tuple[str, ...]:
        """The names of the sources, each once, in order of first use."""
        return tuple(dict.fromkeys(box.source for box in self.boxes))


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the strides, in elements, of a contiguous tensor of this shape."""
    strides = [1] * len(shape)
    for dim in range(len(shape) - 2, -1, -1):
        strides[dim] = strides[dim + 1] * shape[dim + 1]
    return tuple(strides)


def whole(source: str, shape: Sequence[int]) -> TensorMap:
    """Return the tensor map of a tensor that is the source itself."""
    shape = tuple(shape)
    origin, steps, strides = _find_layout(shape)
    box = StridedBox(origin, shape, steps, source, 0, strides)
    return TensorMap(shape, (box,) if prod(shape) else ())


@lru_cache
def _find_layout(shape: Shape) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Return the origin, the steps and the strides of a contiguous tensor."""
    return (0,) * len(shape), (1,) * len(shape), row_major(shape)


def narrow(tensor_map: TensorMap, dim: int, start: int, length: int) -> TensorMap:
    """Return the slice `[start, start + length)` along `dim`."""
    dim = _normalize_dim(dim, len(tensor_map.shape))
    if not 0 <= start <= start + length <= tensor_map.shape[dim]:
        raise TensorMapError(f"[{start}, {start + length}) is outside dim {dim} of {list(tensor_map.shape)}")
    if length == tensor_map.shape[dim]:
        return tensor_map
    stop = start + length
    # Most ranks hold few of many experts, so boxes outside are passed over here rather than by a call.
    clipped = [
        _clip(box, dim, start, stop)
        for box in tensor_map.boxes
        if box.offset[dim] < stop and box.offset[dim] + (box.shape[dim] - 1) * box.steps[dim] >= start
    ]
    return TensorMap(_replace_at(tensor_map.shape, dim, length), tuple(box for box in clipped if box))


def concatenate(tensor_maps: Sequence[TensorMap], dim: int) -> TensorMap:
    """Return the tensor maps joined along `dim`, as `torch.cat` joins tensors."""
    if not tensor_maps:
        raise TensorMapError("there is nothing to concatenate")
    first = tensor_maps[0].shape
    dim = _normalize_dim(dim, len(first))
    for other in tensor_maps:
        if len(other.shape) != len(first) or _replace_at(other.shape, dim, 0) != _replace_at(first, dim, 0):
            raise TensorMapError(f"{list(first)} and {list(other.shape)} do not join along dim {dim}")
    boxes: list[StridedBox] = []
    length = 0
    for tensor_map in tensor_maps:
        boxes += [_shift(box, dim, length) for box in tensor_map.boxes]
        length += tensor_map.shape[dim]
    return TensorMap(_replace_at(first, dim, length), tuple(boxes))


def stack(tensor_maps: Sequence[TensorMap], dim: int) -> TensorMap:
    """Return the tensor maps joined along a new dim, as `torch.stack` joins tensors."""
    if not tensor_maps:
        raise TensorMapError("there is nothing to stack")
    first = tensor_maps[0].shape
    dim = _normalize_dim(dim, len(first) + 1)
    boxes: list[StridedBox] = []
    for index, tensor_map in enumerate(tensor_maps):
        if tensor_map.shape != first:
            raise TensorMapError(f"{list(first)} and {list(tensor_map.shape)} do not stack")
        boxes += [_insert_dim(box, dim, index) for box in tensor_map.boxes]
    return TensorMap((*first[:dim], len(tensor_maps), *first[dim:]), tuple(boxes))


def unbind(tensor_map: TensorMap, dim: int) -> tuple[TensorMap, ...]:
    """Return the slices along `dim`, each without that dim, as `torch.unbind`."""
    dim = _normalize_dim(dim, len(tensor_map.shape))
    slices = (narrow(tensor_map, dim, index, 1) for index in range(tensor_map.shape[dim]))
    return tuple(_squeeze(part, dim) for part in slices)


def split(tensor_map: TensorMap, sizes: Iterable[int], dim: int) -> tuple[TensorMap, ...]:
    """Return consecutive slices of the given sizes along `dim`, which they must fill."""
    parts: list[TensorMap] = []
    start = 0
    for size in sizes:
        parts.append(narrow(tensor_map, dim, start, size))
        start += size
    if start != tensor_map.shape[_normalize_dim(dim, len(tensor_map.shape))]:
        raise TensorMapError(f"sizes that sum to {start} do not split dim {dim} of {list(tensor_map.shape)}")
    return tuple(parts)


def chunk(tensor_map: TensorMap, count: int, dim: int) -> tuple[TensorMap, ...]:
    """Return what `torch.chunk` returns: at most `count` slices of equal size, the last one shorter."""
    dim = _normalize_dim(dim, len(tensor_map.shape))
    bounds = (chunk_bounds(tensor_map.shape[dim], count, index) for index in range(count))
    filled = [length for _, length in bounds if length] or [0]
    return split(tensor_map, filled, dim)


def transpose(tensor_map: TensorMap, dim0: int, dim1: int) -> TensorMap:
    """Return the tensor map with two dims swapped, as `torch.transpose`."""
    order = list(range(len(tensor_map.shape)))
    dim0, dim1 = _normalize_dim(dim0, len(order)), _normalize_dim(dim1, len(order))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return permute(tensor_map, order)


def permute(tensor_map: TensorMap, order: Sequence[int]) -> TensorMap:
    """Return the tensor map with its dims in another order, as `torch.permute`."""
    if sorted(order) != list(range(len(tensor_map.shape))):
        raise TensorMapError(f"{list(order)} is not an order of {len(tensor_map.shape)} dims")

    def reorder(values: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(values[dim] for dim in order)

    return TensorMap(reorder(tensor_map.shape), tuple(_apply_to_dims(box, reorder) for box in tensor_map.boxes))


def chunk_bounds(size: int, count: int, index: int) -> tuple[int, int]:
    """Return start and length of chunk `index` of `count`, as `torch.chunk` cuts: uneven or empty at the end."""
    step = -(-size // count)
    start = min(index * step, size)
    return start, min(step, size - start)


def unravel(index: int, shape: Sequence[int]) -> tuple[int, ...]:
    """Return the index per dim of an element of a contiguous tensor, given its flat index."""
    indices: list[int] = []
    for stride in row_major(shape):
        indices.append(index // stride)
        index %= stride
    return tuple(indices)


def _clip(box: StridedBox, dim: int, start: int, stop: int) -> StridedBox | None:
    offset, step = box.offset[dim], box.steps[dim]
    first = max(0, -((offset - start) // step))
    last = min(box.shape[dim], -((offset - stop) // step))
    if first >= last:
        return None
    return StridedBox(
        _replace_at(box.offset, dim, offset + first * step - start),
        _replace_at(box.shape, dim, last - first),
        box.steps,
        box.source,
        box.base + first * box.strides[dim],
        box.strides,
    )


def _shift(box: StridedBox, dim: int, distance: int) -> StridedBox:
    # Spelled out: `dataclasses.replace` takes several times as long, and a large model has a million boxes.
    offset = _replace_at(box.offset, dim, box.offset[dim] + distance)
    return StridedBox(offset, box.shape, box.steps, box.source, box.base, box.strides)


def _insert_dim(box: StridedBox, dim: int, index: int) -> StridedBox:
    """Return the box in a tensor with one more dim, at one index of it."""
    # Spelled out, because a large model has a million boxes.
    offset, shape, steps, strides = box.offset, box.shape, box.steps, box.strides
    return StridedBox(
        (*offset[:dim], index, *offset[dim:]),
        (*shape[:dim], 1, *shape[dim:]),
        (*steps[:dim], 1, *steps[dim:]),
        box.source,
        box.base,
        (*strides[:dim], 0, *strides[dim:]),
    )


def _squeeze(tensor_map: TensorMap, dim: int) -> TensorMap:
    def remove_dim(values: tuple[int, ...]) -> tuple[int, ...]:
        return values[:dim] + values[dim + 1 :]

    boxes = tuple(_apply_to_dims(box, remove_dim) for box in tensor_map.boxes)
    return TensorMap(remove_dim(tensor_map.shape), boxes)


def _apply_to_dims(box: StridedBox, change: Callable[[tuple[int, ...]], tuple[int, ...]]) -> StridedBox:
    return StridedBox(
        change(box.offset),
        change(box.shape),
        change(box.steps),
        box.source,
        box.base,
        change(box.strides),
    )


def _replace_at(values: tuple[int, ...], dim: int, value: int) -> tuple[int, ...]:
    return (*values[:dim], value, *values[dim + 1 :])


def _normalize_dim(dim: int, ndim: int) -> int:
    if not -ndim <= dim < ndim:
        raise TensorMapError(f"there is no dim {dim} among {ndim}")
    return dim % ndim


def shard_for_rank(
    tensor_map: TensorMap, placements: Sequence[Placement], sizes: Sequence[int], coordinates: Sequence[int]
) -> TensorMap:
    """Return the tensor map of a rank's local tensor.

    Args:
        tensor_map: the tensor map of the whole tensor.
        placements: one per mesh axis, outermost first. The innermost is applied first: FSDP, the outer axis, shards
            what tensor and expert parallelism leave.
        sizes: the sizes of the mesh axes.
        coordinates: the rank's index on each mesh axis.

    Raises:
        TensorMapError: packed groups do not divide by the size of their mesh axis.
    """
    for placement, size, coordinate in reversed(list(zip(placements, sizes, coordinates, strict=True))):
        tensor_map = _apply_placement(tensor_map, placement, size, coordinate)
    return tensor_map


def reassemble(shape: Sequence[int], local_maps: Iterable[tuple[str, TensorMap]]) -> TensorMap:
    """Return the tensor map of a whole tensor over the ranks' local tensors.

    Args:
        shape: the shape of the whole tensor.
        local_maps: each local tensor's name and its tensor map over the whole tensor; together they cover it once.
    """
    strides = row_major(shape)
    boxes: list[StridedBox] = []
    for name, local_map in local_maps:
        local_strides = row_major(local_map.shape)
        for box in local_map.boxes:
            assert all(a == b or n == 1 for a, b, n in zip(box.strides, strides, box.shape, strict=True))
            base = sum(index * stride for index, stride in zip(box.offset, local_strides, strict=True))
            boxes.append(StridedBox(unravel(box.base, shape), box.shape, box.steps, name, base, local_strides))
    return TensorMap(tuple(shape), tuple(boxes))


def _apply_placement(tensor_map: TensorMap, placement: Placement, size: int, coordinate: int) -> TensorMap:
    match placement:
        case Replicate():
            return tensor_map
        case Shard(dim):
            return narrow(tensor_map, dim, *chunk_bounds(tensor_map.shape[dim], size, coordinate))
        case Packed(dim, groups):
            if tensor_map.shape[dim] % (groups * size):
                raise TensorMapError(
                    f"{groups} groups of dim {dim} of {list(tensor_map.shape)} do not divide by {size}"
                )
            if size == 1:
                return tensor_map
            parts = chunk(tensor_map, groups, dim)
            return concatenate(
                [narrow(part, dim, *chunk_bounds(part.shape[dim], size, coordinate)) for part in parts], dim
            )
