"""Whether ranks hold what they must: the shapes that the plan leaves them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from plans.errors import IncompleteError, MismatchError
from plans.mesh import Mesh
from plans.placement import Placement, Replicate, Shard, placement_to_json
from plans.plan import to_wildcard
from runtime.checkpoint.files.safetensors import StoredTensor
from runtime.checkpoint.foreign.cuts import TensorSharding
from runtime.checkpoint.foreign.fused import is_fused
from runtime.checkpoint.foreign.local import LocalShard, Shape
from runtime.extents.forms import chunk_bounds
from runtime.wording import format_names

__all__ = ["check_shapes"]

_SETTINGS_HINT = "check --from-tp, --from-ep and --from-mode, and that config.json is of this model"


def check_shapes(
    folder: Path,
    rank: int,
    mesh: Mesh,
    tensors: Mapping[str, StoredTensor],
    shards: Mapping[str, LocalShard],
    shapes: Mapping[str, Shape],
    shardings: Mapping[str, TensorSharding],
) -> None:
    """Refuse a rank's files that hold other shapes than the plan leaves them, and say which placements would fit.

    Args:
        folder: of the files.
        rank: whose files.
        mesh: of the files.
        tensors: that they hold.
        shards: that they must hold.
        shapes: of the whole stored tensors.
        shardings: how the ranks hold the model's tensors.

    Raises:
        IncompleteError: a tensor is not there.
        MismatchError: one has another shape, or is there although the rank holds nothing of it.
    """
    if missing := [name for name in shards if name not in tensors]:
        first = shards[missing[0]]
        raise IncompleteError(
            f"{folder}: rank {rank} has no {format_names(missing)}, of which {first.sharding.describe(mesh)} leaves it "
            f"{list(first.tensor_map.shape)}",
            hint=_SETTINGS_HINT,
            rank=rank,
            missing=missing,
        )
    for name, tensor in tensors.items():
        local = shards.get(name)
        if tensor.size if local is None else tensor.shape != local.tensor_map.shape:
            raise _shape_error(rank, mesh, name, tensor, shapes[name], local, shardings)


def _shape_error(
    rank: int,
    mesh: Mesh,
    name: str,
    tensor: StoredTensor,
    whole: Shape,
    shard: LocalShard | None,
    shardings: Mapping[str, TensorSharding],
) -> MismatchError:
    """Return the error of a shape that is not the plan's, with those placements that would give it."""
    cut = shard.sharding if shard else shardings.get(name)
    by = cut.describe(mesh) if cut else "the plan"
    fitting = _find_fitting_placements(tensor.shape, whole, mesh, rank, cut) if cut else []
    looks = f"; it looks like {' or '.join(map(str, fitting))}" if fitting else ""
    leaves = list(shard.tensor_map.shape) if shard else "nothing"
    return MismatchError(
        f"{tensor.file}: {name!r} is {list(tensor.shape)}, where {by} leaves rank {rank} {leaves} of {list(whole)}"
        f"{looks}",
        hint=_format_hint(name, fitting[0]) if len(fitting) == 1 and name in shardings else _SETTINGS_HINT,
        name=name,
        file=str(tensor.file),
        fitting=[placement_to_json(placement) for placement in fitting],
    )


def _find_fitting_placements(
    shape: Shape, whole: Shape, mesh: Mesh, rank: int, sharding: TensorSharding
) -> list[Placement]:
    """Return the placements that would leave the rank this shape."""
    if shape == whole:
        return [Replicate()]
    size, index = mesh.sizes(sharding.parameter.mesh)[1], mesh.coordinates(sharding.parameter.mesh, rank)[1]
    locals_ = [(*whole[:d], chunk_bounds(whole[d], size, index)[1], *whole[d + 1 :]) for d in range(len(whole))]
    return [Shard(dim) for dim, local in enumerate(locals_) if local == shape]


def _format_hint(name: str, placement: Placement) -> str:
    said = json.dumps({to_wildcard(name): placement_to_json(placement)})
    each = ""
    if isinstance(placement, Shard) and is_fused(name):
        each = f'; if each matrix in it was cut, {{"packed": [{placement.dim}, [SIZE, …]]}} with their sizes'
    return f"if it is so, give --plan a JSON file that says {said}{each}"
