"""Whether ranks hold what they must: the shapes that the plan leaves them."""

from __future__ import annotations

import json
from collections.abc import Mapping

from plans.errors import IncompleteError, MismatchError
from plans.mesh import Mesh
from plans.placement import Placement, Replicate, Shard, placement_to_json
from plans.plan import wildcard
from plans.resolved import ResolvedParameter
from runtime.checkpoint.extents import chunk_bounds
from runtime.checkpoint.files.safetensors import StoredTensor
from runtime.checkpoint.foreign.local import Local, Shape
from runtime.wording import listed

__all__ = ["check_held"]

_OF_ANOTHER = "check --from-tp, --from-ep and --from-mode, and that config.json is of this model"


def check_held(
    rank: int,
    mesh: Mesh,
    tensors: Mapping[str, StoredTensor],
    locals_: Mapping[str, Local],
    shapes: Mapping[str, Shape],
    rows: Mapping[str, ResolvedParameter],
) -> None:
    """Refuse a rank's files that hold other shapes than the plan leaves them, and say which placements would fit.

    Args:
        rank: whose files.
        mesh: of the files.
        tensors: that they hold.
        locals_: that they must hold.
        shapes: of the whole stored tensors.
        rows: where the model's tensors lie.

    Raises:
        IncompleteError: a tensor is not there.
        MismatchError: one has another shape, or is there although the rank holds nothing of it.
    """
    if missing := [name for name in locals_ if name not in tensors]:
        first = locals_[missing[0]]
        raise IncompleteError(
            f"rank {rank} has no {listed(missing)}, of which {_said(first.row, mesh)} leaves it "
            f"{list(first.form.shape)}",
            hint=_OF_ANOTHER,
            rank=rank,
            missing=missing,
        )
    for name, tensor in tensors.items():
        local = locals_.get(name)
        if tensor.size if local is None else tensor.shape != local.form.shape:
            raise _unlike(rank, mesh, name, tensor, shapes[name], local, rows)


def _unlike(
    rank: int,
    mesh: Mesh,
    name: str,
    tensor: StoredTensor,
    whole: Shape,
    local: Local | None,
    rows: Mapping[str, ResolvedParameter],
) -> MismatchError:
    """Return the error of a shape that is not the plan's, with those placements that would give it."""
    row = local.row if local else rows.get(name)
    by = _said(row, mesh) if row else "the plan"
    fitting = _fitting(tensor.shape, whole, mesh, rank, row) if row else []
    looks = f"; it looks like {' or '.join(map(str, fitting))}" if fitting else ""
    leaves = list(local.form.shape) if local else "nothing"
    return MismatchError(
        f"{tensor.file}: {name!r} is {list(tensor.shape)}, where {by} leaves rank {rank} {leaves} of {list(whole)}"
        f"{looks}",
        hint=_entry(name, fitting[0]) if len(fitting) == 1 and name in rows else _OF_ANOTHER,
        name=name,
        file=str(tensor.file),
        fitting=[placement_to_json(placement) for placement in fitting],
    )


def _said(row: ResolvedParameter, mesh: Mesh) -> str:
    axis, size = mesh.axes(row.mesh)[1], mesh.sizes(row.mesh)[1]
    return f"{row.placements[-1]} over {axis}={size}"


def _fitting(shape: Shape, whole: Shape, mesh: Mesh, rank: int, row: ResolvedParameter) -> list[Placement]:
    """Return the placements that would leave the rank this shape."""
    if shape == whole:
        return [Replicate()]
    size, index = mesh.sizes(row.mesh)[1], mesh.coordinates(row.mesh, rank)[1]
    cut = [(*whole[:d], chunk_bounds(whole[d], size, index)[1], *whole[d + 1 :]) for d in range(len(whole))]
    return [Shard(dim) for dim, local in enumerate(cut) if local == shape]


def _entry(name: str, placement: Placement) -> str:
    said = json.dumps({wildcard(name): placement_to_json(placement)})
    return f"if it is so, give --plan a JSON file that says {said}"
