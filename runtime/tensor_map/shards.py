"""Shards: the forms of what ranks hold of a tensor, and of a whole tensor over what they hold."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from plans.placement import Packed, Placement, Replicate, Shard
from runtime.tensor_map.tensor_map import (
    StridedBox,
    TensorMap,
    TensorMapError,
    chunk,
    chunk_bounds,
    concatenate,
    narrow,
    row_major,
    unravel,
)

__all__ = ["reassemble", "shard_for_rank"]


def shard_for_rank(
    tensor_map: TensorMap, placements: Sequence[Placement], sizes: Sequence[int], coordinates: Sequence[int]
) -> TensorMap:
    """Return the form of the local tensor that a rank holds.

    Args:
        tensor_map: of the whole tensor.
        placements: one per mesh axis, outermost first. The innermost is applied first: FSDP, the outer one, cuts what
            tensor and expert parallelism leave.
        sizes: of the mesh axes.
        coordinates: the rank's index on each mesh axis.

    Raises:
        FormError: packed groups do not divide by their axis.
    """
    for placement, size, coordinate in reversed(list(zip(placements, sizes, coordinates, strict=True))):
        tensor_map = _apply_placement(tensor_map, placement, size, coordinate)
    return tensor_map


def reassemble(shape: Sequence[int], local_maps: Iterable[tuple[str, TensorMap]]) -> TensorMap:
    """Return the form of a whole tensor over the local tensors that ranks hold.

    Args:
        shape: of the whole tensor.
        local_maps: each local tensor's name and its form over the whole tensor; together they cover it once.
    """
    strides = row_major(shape)
    extents: list[StridedBox] = []
    for name, form in local_maps:
        own = row_major(form.shape)
        for extent in form.boxes:
            assert all(a == b or n == 1 for a, b, n in zip(extent.strides, strides, extent.shape, strict=True))
            base = sum(index * stride for index, stride in zip(extent.offset, own, strict=True))
            extents.append(StridedBox(unravel(extent.base, shape), extent.shape, extent.steps, name, base, own))
    return TensorMap(tuple(shape), tuple(extents))


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
