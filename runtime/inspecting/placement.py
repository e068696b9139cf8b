"""A checkpoint's tensors on a mesh: where a manifest or a plan puts each, and the bytes that each rank holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod

from plans.errors import MismatchError, UsageError
from plans.mesh import Mesh, MeshName
from plans.placement import Placement
from plans.plan import find_key
from plans.resolved_plan import ResolvedPlan
from runtime.checkpoint.checkpoint import TensorInfo
from runtime.checkpoint.files.safetensors import tensor_bytes
from runtime.checkpoint.manifest import Manifest
from runtime.inspecting.results import Arrangement, MeshPlacement
from runtime.tensor_map.tensor_map import shard_for_rank, unravel, whole

__all__ = ["PlacementTable", "TensorSlice", "compute_local_bytes", "find_slices", "place_by_manifest", "place_by_plan"]


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


_MAX_RANKS = 2**14


@dataclass(frozen=True)
class _PlannedTensor:
    """Where a tensor of a shape goes: which mesh, its placements and the style that says so."""

    shape: tuple[int, ...]
    axes: MeshName
    placements: tuple[Placement, ...]
    style: str | None


_BytesKey = tuple[str, tuple[int, ...], MeshName, tuple[Placement, ...]]


@dataclass(frozen=True)
class PlacementTable:
    """Tensors on a mesh; what is alike is worked out once.

    Args:
        template: the arrangement, without bytes.
        entries: of tensors, by name; carried ones lie whole on rank 0.
        cached_bytes: bytes on each rank, by what they depend on.
    """

    template: Arrangement
    entries: Mapping[str, _PlannedTensor]
    cached_bytes: dict[_BytesKey, tuple[int, ...]] = field(default_factory=dict)

    def get_placement(self, name: str, tensor: TensorInfo) -> MeshPlacement | None:
        """Return how a tensor lies, None where it is carried.

        Raises:
            MismatchError: it is not in the model, or has another shape there.
        """
        if tensor.kind == "carried":
            return None
        place, on_ranks = self._get_entry(name, tensor), self.get_rank_bytes(name, tensor)
        return MeshPlacement(place.axes, place.placements, place.style, min(on_ranks), max(on_ranks))

    def get_rank_bytes(self, name: str, tensor: TensorInfo) -> tuple[int, ...]:
        """Return the bytes that each rank holds of a tensor."""
        if tensor.kind == "carried":
            return (tensor_bytes(tensor.dtype, tensor.shape), *(0,) * (self.template.mesh.world_size - 1))
        place = self._get_entry(name, tensor)
        alike = tensor.dtype, tensor.shape, place.axes, place.placements
        if alike not in self.cached_bytes:
            self.cached_bytes[alike] = compute_local_bytes(
                tensor.dtype, tensor.shape, place.placements, self.template.mesh, place.axes
            )
        return self.cached_bytes[alike]

    def arrange(self, tensors: Mapping[str, TensorInfo]) -> Arrangement:
        """Return the arrangement with the bytes that each rank holds of these tensors."""
        counts = Counter(self.get_rank_bytes(name, held) for name, held in tensors.items())
        totals = [0] * self.template.mesh.world_size
        for on_ranks, count in counts.items():
            totals = [total + count * size for total, size in zip(totals, on_ranks, strict=True)]
        return replace(self.template, rank_bytes=tuple(totals))

    def _get_entry(self, name: str, tensor: TensorInfo) -> _PlannedTensor:
        place = self.entries.get(name)
        if place is None or place.shape != tensor.shape:
            said = list(place.shape) if place else "not there"
            raise MismatchError(
                f"{name} is {said} in the model but {list(tensor.shape)} in the checkpoint",
                hint="config.json does not belong to these weights",
                name=name,
            )
        return place


def place_by_manifest(manifest: Manifest) -> PlacementTable:
    """Return where a checkpoint's own manifest says that its tensors are.

    Raises:
        UsageError: it speaks of more ranks than can be told one by one.
    """
    _check_world_size(manifest.mesh)
    empty = Arrangement(manifest.mesh, manifest.mode, manifest.dialect, manifest.plan, ())
    places = {
        name: _PlannedTensor(entry.shape, entry.mesh, entry.placements, _find_style(manifest.plan, name))
        for name, entry in manifest.tensors.items()
    }
    return PlacementTable(empty, places)


def place_by_plan(plan: ResolvedPlan) -> PlacementTable:
    """Return where a resolved plan puts a model's tensors.

    Raises:
        UsageError: it is for more ranks than can be told one by one.
    """
    _check_world_size(plan.mesh)
    empty = Arrangement(plan.mesh, plan.mode, plan.dialect, plan.plan, (), plan.unmatched)
    places = {row.name: _PlannedTensor(row.shape, row.mesh, row.placements, row.style) for row in plan.parameters}
    return PlacementTable(empty, places)


def _check_world_size(mesh: Mesh) -> None:
    if mesh.world_size > _MAX_RANKS:
        raise UsageError(
            f"a mesh of {mesh.world_size:,} ranks is too large to be inspected rank by rank",
            hint=f"{_MAX_RANKS:,} ranks are the most; a manifest that speaks of more is damaged",
            world_size=mesh.world_size,
        )


def _find_style(plan: Mapping[str, str], name: str) -> str | None:
    key = find_key(plan, name, is_parameter=True)
    return plan[key] if key else None
