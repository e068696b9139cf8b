"""What a rank must hold of each stored tensor, so that its local parameters are made of what it holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from plans.errors import ConversionError, MismatchError
from plans.mesh import Mesh
from runtime.checkpoint.foreign.cuts import TensorSharding
from runtime.extents.forms import TensorMap, TensorMapError, narrow, whole
from runtime.extents.turned import invert

__all__ = ["LocalShard", "Shape", "compute_shards"]

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LocalShard:
    """A rank's part of a stored tensor.

    Args:
        tensor_map: over the whole stored tensor.
        sharding: of the parameter that the rank needs it for.
    """

    tensor_map: TensorMap
    sharding: TensorSharding


def compute_shards(
    rank: int,
    mesh: Mesh,
    tensor_maps: Mapping[str, TensorMap],
    shardings: Mapping[str, TensorSharding],
    shapes: Mapping[str, Shape],
) -> dict[str, LocalShard]:
    """Return what a rank holds of the stored tensors; those of which it holds nothing are left out.

    A tensor that is stored as the model has it is cut as the parameter is. Of one in hub form a rank holds the box that
    its local parameter is made of: of an expert's own `gate_proj` the rows that it has in `gate_up_proj`.

    Args:
        rank: whose.
        mesh: of the files.
        tensor_maps: of the model's tensors over the whole stored ones.
        shardings: how the ranks hold them.
        shapes: of the whole stored tensors.

    Raises:
        MismatchError: a packed parameter does not divide.
        ConversionError: a rank would hold a part of a stored tensor that is no box.
    """
    local = {name: _compute_local_map(form, shardings[name], mesh, rank) for name, form in tensor_maps.items()}
    plain = {name: form.sources[0] for name, form in tensor_maps.items() if _is_identity(form, shapes)}
    held = {source: LocalShard(local[name], shardings[name]) for name, source in plain.items() if local[name].boxes}
    converted = {name: form for name, form in local.items() if name not in plain}
    users = {source: shardings[name] for name, form in converted.items() for source in form.sources}
    used = invert(converted, {source: shapes[source] for source in users})
    return held | {source: LocalShard(_find_box(source, used[source], cut), cut) for source, cut in users.items()}


def _is_identity(tensor_map: TensorMap, shapes: Mapping[str, Shape]) -> bool:
    sources = tensor_map.sources
    return len(sources) == 1 and tensor_map == whole(sources[0], shapes[sources[0]])


def _compute_local_map(tensor_map: TensorMap, sharding: TensorSharding, mesh: Mesh, rank: int) -> TensorMap:
    try:
        return sharding.local_map(tensor_map, mesh, rank)
    except TensorMapError as error:
        raise MismatchError(
            f"{sharding.parameter.name}: {error}",
            hint="correct --from-tp and --from-ep, or say in a --plan how it was cut",
            name=sharding.parameter.name,
        ) from error


def _find_box(source: str, used: TensorMap, sharding: TensorSharding) -> TensorMap:
    """Return the box of a stored tensor that holds all that is used of it, and nothing else."""
    box = whole(source, used.shape)
    for dim in range(len(used.shape)):
        start = min(extent.offset[dim] for extent in used.boxes)
        stop = max(e.offset[dim] + (e.shape[dim] - 1) * e.steps[dim] + 1 for e in used.boxes)
        box = narrow(box, dim, start, stop - start)
    if prod(box.shape) != sum(prod(extent.shape) for extent in used.boxes):
        raise ConversionError(
            f"{sharding.parameter.name} at {sharding.placement} leaves a rank scattered parts of {source!r}",
            hint="save the rank files under the model's own names, which need no conversion",
            name=sharding.parameter.name,
            tensor=source,
        )
    return box
