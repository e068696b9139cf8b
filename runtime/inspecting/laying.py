"""A checkpoint's tensors on a mesh: where a manifest or a plan puts each, and the bytes that each rank holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from plans.errors import MismatchError, UsageError
from plans.mesh import Mesh, MeshName
from plans.placement import Placement
from plans.plan import lookup
from plans.resolved import ResolvedPlan
from runtime.checkpoint.content import Held
from runtime.checkpoint.files.safetensors import tensor_bytes
from runtime.checkpoint.record import Manifest
from runtime.inspecting.slices import local_bytes
from runtime.inspecting.values import Arrangement, Placed

__all__ = ["Laying", "of_manifest", "of_plan"]

_MOST_RANKS = 2**14


@dataclass(frozen=True)
class _Place:
    """Where a tensor of a shape goes: which mesh, its placements and the style that says so."""

    shape: tuple[int, ...]
    axes: MeshName
    placements: tuple[Placement, ...]
    style: str | None


_Alike = tuple[str, tuple[int, ...], MeshName, tuple[Placement, ...]]


@dataclass(frozen=True)
class Laying:
    """Tensors on a mesh; what is alike is worked out once.

    Args:
        empty: the arrangement, without bytes.
        places: of tensors, by name; carried ones lie whole on rank 0.
        known: bytes on each rank, by what they depend on.
    """

    empty: Arrangement
    places: Mapping[str, _Place]
    known: dict[_Alike, tuple[int, ...]] = field(default_factory=dict)

    def placed(self, name: str, held: Held) -> Placed | None:
        """Return how a tensor lies, None where it is carried.

        Raises:
            MismatchError: it is not in the model, or has another shape there.
        """
        if held.kind == "carried":
            return None
        place, on_ranks = self._place(name, held), self.bytes_of(name, held)
        return Placed(place.axes, place.placements, place.style, min(on_ranks), max(on_ranks))

    def bytes_of(self, name: str, held: Held) -> tuple[int, ...]:
        """Return the bytes that each rank holds of a tensor."""
        if held.kind == "carried":
            return (tensor_bytes(held.dtype, held.shape), *(0,) * (self.empty.mesh.world_size - 1))
        place = self._place(name, held)
        alike = held.dtype, held.shape, place.axes, place.placements
        if alike not in self.known:
            self.known[alike] = local_bytes(held.dtype, held.shape, place.placements, self.empty.mesh, place.axes)
        return self.known[alike]

    def arrangement(self, tensors: Mapping[str, Held]) -> Arrangement:
        """Return the arrangement with the bytes that each rank holds of these tensors."""
        counts = Counter(self.bytes_of(name, held) for name, held in tensors.items())
        totals = [0] * self.empty.mesh.world_size
        for on_ranks, count in counts.items():
            totals = [total + count * size for total, size in zip(totals, on_ranks, strict=True)]
        return replace(self.empty, rank_bytes=tuple(totals))

    def _place(self, name: str, held: Held) -> _Place:
        place = self.places.get(name)
        if place is None or place.shape != held.shape:
            said = list(place.shape) if place else "not there"
            raise MismatchError(
                f"{name} is {said} in the model but {list(held.shape)} in the checkpoint",
                hint="config.json does not belong to these weights",
                name=name,
            )
        return place


def of_manifest(manifest: Manifest) -> Laying:
    """Return where a checkpoint's own manifest says that its tensors are.

    Raises:
        UsageError: it speaks of more ranks than can be told one by one.
    """
    _check_ranks(manifest.mesh)
    empty = Arrangement(manifest.mesh, manifest.mode, manifest.dialect, manifest.plan, ())
    places = {
        name: _Place(entry.shape, entry.mesh, entry.placements, _style(manifest.plan, name))
        for name, entry in manifest.tensors.items()
    }
    return Laying(empty, places)


def of_plan(plan: ResolvedPlan) -> Laying:
    """Return where a resolved plan puts a model's tensors.

    Raises:
        UsageError: it is for more ranks than can be told one by one.
    """
    _check_ranks(plan.mesh)
    empty = Arrangement(plan.mesh, plan.mode, plan.dialect, plan.plan, (), plan.unmatched)
    places = {row.name: _Place(row.shape, row.mesh, row.placements, row.style) for row in plan.parameters}
    return Laying(empty, places)


def _check_ranks(mesh: Mesh) -> None:
    if mesh.world_size > _MOST_RANKS:
        raise UsageError(
            f"a mesh of {mesh.world_size:,} ranks is too large to be inspected rank by rank",
            hint=f"{_MOST_RANKS:,} ranks are the most; a manifest that speaks of more is damaged",
            world_size=mesh.world_size,
        )


def _style(plan: Mapping[str, str], name: str) -> str | None:
    key = lookup(plan, name, is_parameter=True)
    return plan[key] if key else None
