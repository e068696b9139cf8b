"""What a rank must hold of each stored tensor, so that its local parameters are made of what it holds."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from plans.errors import ConversionError, IncompleteError, MismatchError
from plans.mesh import Mesh
from plans.placement import Placement, Replicate, Shard, placement_to_json
from plans.plan import to_wildcard
from plans.text import format_names
from runtime.checkpoint.external.sharding import TensorSharding, is_fused
from runtime.checkpoint.files.safetensors import StoredTensor, has_same_bytes
from runtime.tensor_map.compose import invert
from runtime.tensor_map.tensor_map import TensorMap, TensorMapError, chunk_bounds, narrow, reassemble, whole

__all__ = [
    "LocalShard",
    "RankChunk",
    "Shape",
    "check_shapes",
    "check_tied_chunks",
    "compute_shards",
    "drop_duplicates",
    "reassemble_tensors",
]


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
            hint="correct `from_tp` and `from_ep`, or say in `plan` how it was sharded",
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


_SETTINGS_HINT = "check `from_tp`, `from_ep` and `from_mode`, and that config.json is of this model"


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
    return f"if it is so, give `plan` a JSON file that says {said}{each}"


@dataclass(frozen=True, slots=True)
class RankChunk:
    """What one rank's files hold of a stored tensor.

    Args:
        rank: whose.
        name: of the stored tensor.
        tensor_map: of the piece over the whole tensor.
        stored: where its bytes are.
    """

    rank: int
    name: str
    tensor_map: TensorMap
    stored: StoredTensor

    @property
    def key(self) -> str:
        """The name of the piece, unique in the checkpoint."""
        return f"{self.rank}/{self.name}"


def drop_duplicates(chunks: Iterable[RankChunk]) -> list[RankChunk]:
    """Return one of the pieces that hold the same part of a tensor; all others are read and must have its bytes.

    Raises:
        MismatchError: they do not.
    """
    first: dict[TensorMap, RankChunk] = {}
    for piece in chunks:
        kept = first.setdefault(piece.tensor_map, piece)
        if kept is not piece and not has_same_bytes(kept.stored, piece.stored):
            raise MismatchError(
                f"{piece.name!r} should be the same in {kept.stored.file} and in {piece.stored.file}, but is not",
                hint="if the plan is wrong, say in `plan` how it was sharded; or the files belong to several checkpoints",
                name=piece.name,
                files=[str(kept.stored.file), str(piece.stored.file)],
            )
    return list(first.values())


def check_tied_chunks(chunks: Sequence[RankChunk], tied_pairs: Mapping[str, str]) -> None:
    """Refuse names of one tensor that hold different bytes.

    Args:
        chunks: of all ranks.
        tied_pairs: each tied name with the name of its target, both stored.

    Raises:
        ConversionError: on some rank they do.
    """
    held = {(piece.rank, piece.name): piece.stored for piece in chunks}
    for piece in chunks:
        target = tied_pairs.get(piece.name)
        if target is not None and not has_same_bytes(piece.stored, held[piece.rank, target]):
            raise ConversionError(
                f"{piece.name} is tied to {target} but stored with other values in {piece.stored.file}",
                hint="set tie_word_embeddings to false in config.json, or remove one of the two from the files",
                name=piece.name,
                tied_to=target,
            )


def reassemble_tensors(chunks: Iterable[RankChunk], shapes: Mapping[str, Shape]) -> dict[str, TensorMap]:
    """Return the forms of the whole stored tensors over the keys of the pieces.

    Args:
        chunks: which hold every part of every tensor once.
        shapes: of the stored tensors.
    """
    by_name: defaultdict[str, list[tuple[str, TensorMap]]] = defaultdict(list)
    for piece in chunks:
        by_name[piece.name].append((piece.key, piece.tensor_map))
    return {name: reassemble(shape, by_name[name]) for name, shape in shapes.items()}
