"""Slices: which boxes of a tensor a placement cuts, and which ranks hold each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from plans.mesh import Mesh, MeshName
from plans.placement import Placement
from runtime.checkpoint.files.safetensors import tensor_bytes
from runtime.extents.forms import unravel, whole
from runtime.extents.shards import shard_for_rank

__all__ = ["TensorSlice", "compute_local_bytes", "find_slices"]


@dataclass(frozen=True, slots=True)
class TensorSlice:
    """A box of a tensor.

    Args:
        bounds: start and stop per tensor dim.
        ranks: that hold it, in order.
    """

    bounds: tuple[tuple[int, int], ...]
    ranks: tuple[int, ...]


def find_slices(
    shape: Sequence[int], placements: Sequence[Placement], mesh: Mesh, axes: MeshName
) -> tuple[TensorSlice, ...]:
    """Return the boxes of a tensor that ranks hold, from its first element on; a packed shard has one for each group.

    Args:
        shape: of the whole tensor.
        placements: one per axis, outermost first.
        mesh: whose ranks hold it.
        axes: which of its two meshes the placements speak of.
    """
    tensor = whole("", shape)
    holders: dict[tuple[tuple[int, int], ...], list[int]] = {}
    for rank in range(mesh.world_size):
        for extent in shard_for_rank(tensor, placements, mesh.sizes(axes), mesh.coordinates(axes, rank)).boxes:
            starts = unravel(extent.base, shape)
            bounds = tuple((start, start + size) for start, size in zip(starts, extent.shape, strict=True))
            holders.setdefault(bounds, []).append(rank)
    return tuple(TensorSlice(bounds, tuple(holders[bounds])) for bounds in sorted(holders))


def compute_local_bytes(
    dtype: str, shape: Sequence[int], placements: Sequence[Placement], mesh: Mesh, axes: MeshName
) -> tuple[int, ...]:
    """Return the bytes that each rank holds of a tensor; arguments as for `find_slices`."""
    tensor, sizes = whole("", shape), mesh.sizes(axes)
    ranks = range(mesh.world_size)
    shapes = (shard_for_rank(tensor, placements, sizes, mesh.coordinates(axes, rank)).shape for rank in ranks)
    return tuple(tensor_bytes(dtype, local) if prod(local) else 0 for local in shapes)
