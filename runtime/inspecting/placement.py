"""A checkpoint's tensors on a mesh: how a manifest or a plan places each, and how many bytes each rank holds."""

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
        bounds: the start and stop in each dimension.
        ranks: the ranks that hold it, in order.
    """

    bounds: tuple[tuple[int, int], ...]
    ranks: tuple[int, ...]


def find_slices(
    shape: Sequence[int], placements: Sequence[Placement], mesh: Mesh, axes: MeshName, stages: Sequence[int] = ()
) -> tuple[TensorSlice, ...]:
    """Return the boxes of a tensor that ranks hold, sorted by bounds; a packed shard has one box for each group.

    Args:
        shape: the shape of the whole tensor.
        placements: one placement per mesh axis, outermost first.
        mesh: the mesh that it is placed on.
        axes: which of the mesh's two sets of axes the placements refer to.
        stages: the pipeline stages that hold it; empty if the mesh has only one.
    """
    tensor = whole("", shape)
    holders: dict[tuple[tuple[int, int], ...], list[int]] = {}
    for rank in (rank for rank in range(mesh.world_size) if mesh.holds(rank, stages)):
        for box in shard_for_rank(tensor, placements, mesh.sizes(axes), mesh.coordinates(axes, rank)).boxes:
            starts = unravel(box.base, shape)
            bounds = tuple((start, start + size) for start, size in zip(starts, box.shape, strict=True))
            holders.setdefault(bounds, []).append(rank)
    return tuple(TensorSlice(bounds, tuple(holders[bounds])) for bounds in sorted(holders))


def compute_local_bytes(
    dtype: str,
    shape: Sequence[int],
    placements: Sequence[Placement],
    mesh: Mesh,
    axes: MeshName,
    stages: Sequence[int] = (),
) -> tuple[int, ...]:
    """Return how many bytes of a tensor each rank holds; see `find_slices` for the arguments."""
    tensor, sizes = whole("", shape), mesh.sizes(axes)
    ranks = range(mesh.replica_size)
    shapes = (shard_for_rank(tensor, placements, sizes, mesh.coordinates(axes, rank)).shape for rank in ranks)
    in_one = tuple(tensor_bytes(dtype, local) if prod(local) else 0 for local in shapes)
    replicas = (mesh.holds(first, stages) for first in range(0, mesh.world_size, mesh.replica_size))
    return tuple(size * holds for holds in replicas for size in in_one)


_MAX_RANKS = 2**14


@dataclass(frozen=True)
class _PlannedTensor:
    """A tensor's shape, the mesh axes, placements and stages that it gets, and the style that they come from."""

    shape: tuple[int, ...]
    axes: MeshName
    placements: tuple[Placement, ...]
    style: str | None
    stages: tuple[int, ...]


_BytesKey = tuple[str, tuple[int, ...], MeshName, tuple[Placement, ...], tuple[int, ...]]


@dataclass(frozen=True)
class PlacementTable:
    """The placement of each tensor on a mesh.

    Args:
        template: the arrangement, without bytes.
        entries: the placed tensors by name; passthrough tensors have no entry and lie whole on rank 0.
        cached_bytes: the bytes that each rank holds, computed once for all tensors with the same dtype, shape and
            placements.
    """

    template: Arrangement
    entries: Mapping[str, _PlannedTensor]
    cached_bytes: dict[_BytesKey, tuple[int, ...]] = field(default_factory=dict)

    def get_placement(self, name: str, tensor: TensorInfo) -> MeshPlacement | None:
        """Return how a tensor is placed, None for a passthrough tensor.

        Raises:
            MismatchError: the model lacks the tensor, or has it in another shape.
        """
        if tensor.kind == "carried":
            return None
        entry, rank_bytes = self._get_entry(name, tensor), self.get_rank_bytes(name, tensor)
        mesh = self.template.mesh
        held = [size for rank, size in enumerate(rank_bytes) if mesh.holds(rank, entry.stages)]
        return MeshPlacement(entry.axes, entry.placements, entry.style, min(held), max(held), entry.stages)

    def get_rank_bytes(self, name: str, tensor: TensorInfo) -> tuple[int, ...]:
        """Return how many bytes of a tensor each rank holds."""
        if tensor.kind == "carried":
            return (tensor_bytes(tensor.dtype, tensor.shape), *(0,) * (self.template.mesh.world_size - 1))
        entry = self._get_entry(name, tensor)
        key = tensor.dtype, tensor.shape, entry.axes, entry.placements, entry.stages
        if key not in self.cached_bytes:
            self.cached_bytes[key] = compute_local_bytes(
                tensor.dtype, tensor.shape, entry.placements, self.template.mesh, entry.axes, entry.stages
            )
        return self.cached_bytes[key]

    def arrange(self, tensors: Mapping[str, TensorInfo]) -> Arrangement:
        """Return the arrangement of these tensors, with the bytes that each rank holds."""
        counts = Counter(self.get_rank_bytes(name, tensor) for name, tensor in tensors.items())
        totals = [0] * self.template.mesh.world_size
        for rank_bytes, count in counts.items():
            totals = [total + count * size for total, size in zip(totals, rank_bytes, strict=True)]
        return replace(self.template, rank_bytes=tuple(totals))

    def _get_entry(self, name: str, tensor: TensorInfo) -> _PlannedTensor:
        entry = self.entries.get(name)
        if entry is None or entry.shape != tensor.shape:
            expected = f"has shape {list(entry.shape)}" if entry else "does not exist"
            raise MismatchError(
                f"{name} {expected} in the model, but has shape {list(tensor.shape)} in the checkpoint",
                hint="config.json does not belong to these weights",
                name=name,
            )
        return entry


def place_by_manifest(manifest: Manifest) -> PlacementTable:
    """Return how a checkpoint's tensors are placed according to its own manifest.

    Raises:
        UsageError: its mesh has too many ranks to list.
    """
    _check_world_size(manifest.mesh)
    template = Arrangement(manifest.mesh, manifest.mode, manifest.dialect, manifest.plan, ())
    entries = {
        name: _PlannedTensor(entry.shape, entry.mesh, entry.placements, _find_style(manifest.plan, name), entry.stages)
        for name, entry in manifest.tensors.items()
    }
    return PlacementTable(template, entries)


def place_by_plan(plan: ResolvedPlan) -> PlacementTable:
    """Return how a resolved plan places a model's tensors.

    Raises:
        UsageError: its mesh has too many ranks to list.
    """
    _check_world_size(plan.mesh)
    template = Arrangement(plan.mesh, plan.mode, plan.dialect, plan.plan, (), plan.unmatched)
    entries = {
        row.name: _PlannedTensor(row.shape, row.mesh, row.placements, row.style, row.stages) for row in plan.parameters
    }
    return PlacementTable(template, entries)


def _check_world_size(mesh: Mesh) -> None:
    if mesh.world_size > _MAX_RANKS:
        raise UsageError(
            f"a mesh of {mesh.world_size:,} ranks is too large to inspect",
            hint=f"use at most {_MAX_RANKS:,} ranks; a manifest that names more is damaged",
            world_size=mesh.world_size,
        )


def _find_style(plan: Mapping[str, str], name: str) -> str | None:
    key = find_key(plan, name, is_parameter=True)
    return plan[key] if key else None
