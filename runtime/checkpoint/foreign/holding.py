"""Whether ranks hold what they must: the shapes that the plan leaves them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from plans.errors import IncompleteError, MismatchError
from plans.mesh import Mesh
from plans.placement import Placement, Replicate, Shard, placement_to_json
from plans.plan import wildcard
from runtime.checkpoint.files.safetensors import StoredTensor
from runtime.checkpoint.foreign.cuts import Cut
from runtime.checkpoint.foreign.fused import is_fused
from runtime.checkpoint.foreign.local import Local, Shape
from runtime.extents.forms import chunk_bounds
from runtime.wording import listed

__all__ = ["check_held"]

_OF_ANOTHER = "check --from-tp, --from-ep and --from-mode, and that config.json is of this model"


def check_held(
    folder: Path,
    rank: int,
    mesh: Mesh,
    tensors: Mapping[str, StoredTensor],
    locals_: Mapping[str, Local],
    shapes: Mapping[str, Shape],
    cuts: Mapping[str, Cut],
) -> None:
    """Refuse a rank's files that hold other shapes than the plan leaves them, and say which placements would fit.

    Args:
        folder: of the files.
        rank: whose files.
        mesh: of the files.
        tensors: that they hold.
        locals_: that they must hold.
        shapes: of the whole stored tensors.
        cuts: how the ranks hold the model's tensors.

    Raises:
        IncompleteError: a tensor is not there.
        MismatchError: one has another shape, or is there although the rank holds nothing of it.
    """
    if missing := [name for name in locals_ if name not in tensors]:
        first = locals_[missing[0]]
        raise IncompleteError(
            f"{folder}: rank {rank} has no {listed(missing)}, of which {first.cut.said(mesh)} leaves it "
            f"{list(first.form.shape)}",
            hint=_OF_ANOTHER,
            rank=rank,
            missing=missing,
        )
    for name, tensor in tensors.items():
        local = locals_.get(name)
        if tensor.size if local is None else tensor.shape != local.form.shape:
            raise _unlike(rank, mesh, name, tensor, shapes[name], local, cuts)


def _unlike(
    rank: int,
    mesh: Mesh,
    name: str,
    tensor: StoredTensor,
    whole: Shape,
    local: Local | None,
    cuts: Mapping[str, Cut],
) -> MismatchError:
    """Return the error of a shape that is not the plan's, with those placements that would give it."""
    cut = local.cut if local else cuts.get(name)
    by = cut.said(mesh) if cut else "the plan"
    fitting = _fitting(tensor.shape, whole, mesh, rank, cut) if cut else []
    looks = f"; it looks like {' or '.join(map(str, fitting))}" if fitting else ""
    leaves = list(local.form.shape) if local else "nothing"
    return MismatchError(
        f"{tensor.file}: {name!r} is {list(tensor.shape)}, where {by} leaves rank {rank} {leaves} of {list(whole)}"
        f"{looks}",
        hint=_entry(name, fitting[0]) if len(fitting) == 1 and name in cuts else _OF_ANOTHER,
        name=name,
        file=str(tensor.file),
        fitting=[placement_to_json(placement) for placement in fitting],
    )


def _fitting(shape: Shape, whole: Shape, mesh: Mesh, rank: int, cut: Cut) -> list[Placement]:
    """Return the placements that would leave the rank this shape."""
    if shape == whole:
        return [Replicate()]
    size, index = mesh.sizes(cut.row.mesh)[1], mesh.coordinates(cut.row.mesh, rank)[1]
    locals_ = [(*whole[:d], chunk_bounds(whole[d], size, index)[1], *whole[d + 1 :]) for d in range(len(whole))]
    return [Shard(dim) for dim, local in enumerate(locals_) if local == shape]


def _entry(name: str, placement: Placement) -> str:
    said = json.dumps({wildcard(name): placement_to_json(placement)})
    each = ""
    if isinstance(placement, Shard) and is_fused(name):
        each = f'; if each matrix in it was cut, {{"packed": [{placement.dim}, [SIZE, …]]}} with their sizes'
    return f"if it is so, give --plan a JSON file that says {said}{each}"
