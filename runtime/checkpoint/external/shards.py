"""The part of each stored tensor that a rank's files must contain to make up its local parameters, and checks of it."""

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
        tensor_map: the part, over the whole stored tensor.
        sharding: the sharding of the parameter that it is part of.
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
    """Return a rank's part of each stored tensor; tensors that it has no part of are left out.

    A tensor that is stored as in the model is sharded like its parameter. For a tensor in hub form, the rank has the
    box that its local parameter is built from: of an expert's own `gate_proj`, its rows of the local `gate_up_proj`.

    Args:
        rank: the rank.
        mesh: the mesh of the files.
        tensor_maps: the model's tensors over the whole stored ones.
        shardings: how the model's tensors are sharded.
        shapes: the shapes of the whole stored tensors.

    Raises:
        MismatchError: the groups of a packed parameter do not divide evenly.
        ConversionError: the rank's part of a stored tensor would not be a box.
    """
    local = {
        name: _compute_local_map(whole_map, shardings[name], mesh, rank) for name, whole_map in tensor_maps.items()
    }
    unconverted = {name: m.sources[0] for name, m in tensor_maps.items() if _is_identity(m, shapes)}
    shards = {
        source: LocalShard(local[name], shardings[name]) for name, source in unconverted.items() if local[name].boxes
    }
    converted = {name: local_map for name, local_map in local.items() if name not in unconverted}
    users = {source: shardings[name] for name, local_map in converted.items() for source in local_map.sources}
    used = invert(converted, {source: shapes[source] for source in users})
    return shards | {
        source: LocalShard(_find_box(source, used[source], sharding), sharding) for source, sharding in users.items()
    }


def _is_identity(tensor_map: TensorMap, shapes: Mapping[str, Shape]) -> bool:
    sources = tensor_map.sources
    return len(sources) == 1 and tensor_map == whole(sources[0], shapes[sources[0]])


def _compute_local_map(tensor_map: TensorMap, sharding: TensorSharding, mesh: Mesh, rank: int) -> TensorMap:
    try:
        return sharding.local_map(tensor_map, mesh, rank)
    except TensorMapError as error:
        raise MismatchError(
            f"{sharding.parameter.name}: {error}",
            hint="correct `from_tp` and `from_ep`, or give its placement in `plan`",
            name=sharding.parameter.name,
        ) from error


def _find_box(source: str, used: TensorMap, sharding: TensorSharding) -> TensorMap:
    """Return the box of a stored tensor that contains exactly the elements that are used."""
    box = whole(source, used.shape)
    for dim in range(len(used.shape)):
        start = min(part.offset[dim] for part in used.boxes)
        stop = max(part.offset[dim] + (part.shape[dim] - 1) * part.steps[dim] + 1 for part in used.boxes)
        box = narrow(box, dim, start, stop - start)
    if prod(box.shape) != sum(prod(part.shape) for part in used.boxes):
        raise ConversionError(
            f"{sharding.parameter.name} at {sharding.placement} leaves a rank scattered parts of {source!r}",
            hint="save the rank files under the model's own names, which need no conversion",
            name=sharding.parameter.name,
            tensor=source,
        )
    return box


_SETTINGS_HINT = "check `from_tp`, `from_ep` and `from_mode`, and that config.json belongs to this model"


def check_shapes(
    folder: Path,
    rank: int,
    mesh: Mesh,
    tensors: Mapping[str, StoredTensor],
    shards: Mapping[str, LocalShard],
    shapes: Mapping[str, Shape],
    shardings: Mapping[str, TensorSharding],
) -> None:
    """Refuse a rank's files with other shapes than the plan gives the rank, and name the placements that would fit.

    Args:
        folder: the folder of the files.
        rank: the rank.
        mesh: the mesh of the files.
        tensors: the tensors in the rank's files.
        shards: the parts that the files must contain.
        shapes: the shapes of the whole stored tensors.
        shardings: how the model's tensors are sharded.

    Raises:
        IncompleteError: a tensor is missing.
        MismatchError: a tensor has another shape, or is not empty although the rank has no part of it.
    """
    if missing := [name for name in shards if name not in tensors]:
        first = shards[missing[0]]
        raise IncompleteError(
            f"{folder}: rank {rank} has no {format_names(missing)}, but {first.sharding.describe(mesh)} gives it "
            f"{list(first.tensor_map.shape)}",
            hint=_SETTINGS_HINT,
            rank=rank,
            missing=missing,
        )
    for name, tensor in tensors.items():
        shard = shards.get(name)
        if tensor.size if shard is None else tensor.shape != shard.tensor_map.shape:
            raise _shape_error(rank, mesh, name, tensor, shapes[name], shard, shardings)


def _shape_error(
    rank: int,
    mesh: Mesh,
    name: str,
    tensor: StoredTensor,
    whole: Shape,
    shard: LocalShard | None,
    shardings: Mapping[str, TensorSharding],
) -> MismatchError:
    """Return the error for a shape that the plan does not give, with the placements that would give it."""
    sharding = shard.sharding if shard else shardings.get(name)
    fitting = _find_fitting_placements(tensor.shape, whole, mesh, rank, sharding) if sharding else []
    by = sharding.describe(mesh) if sharding else "the plan"
    expected = list(shard.tensor_map.shape) if shard else "nothing"
    guess = f"; it looks like {' or '.join(map(str, fitting))}" if fitting else ""
    return MismatchError(
        f"{tensor.file}: {name!r} is {list(tensor.shape)}, but {by} gives rank {rank} {expected} of {list(whole)}"
        f"{guess}",
        hint=_format_hint(name, fitting[0]) if len(fitting) == 1 and name in shardings else _SETTINGS_HINT,
        name=name,
        file=str(tensor.file),
        fitting=[placement_to_json(placement) for placement in fitting],
    )


def _find_fitting_placements(
    shape: Shape, whole: Shape, mesh: Mesh, rank: int, sharding: TensorSharding
) -> list[Placement]:
    """Return the placements that would give the rank this shape."""
    if shape == whole:
        return [Replicate()]
    size, index = mesh.sizes(sharding.parameter.mesh)[1], mesh.coordinates(sharding.parameter.mesh, rank)[1]
    local_shapes = [(*whole[:d], chunk_bounds(whole[d], size, index)[1], *whole[d + 1 :]) for d in range(len(whole))]
    return [Shard(dim) for dim, local_shape in enumerate(local_shapes) if local_shape == shape]


def _format_hint(name: str, placement: Placement) -> str:
    entry = json.dumps({to_wildcard(name): placement_to_json(placement)})
    packed = ""
    if isinstance(placement, Shard) and is_fused(name):
        packed = (
            f'; if each matrix in it was sharded by itself, {{"packed": [{placement.dim}, [SIZE, …]]}} with their sizes'
        )
    return f"if it is, give `plan` a JSON file that says {entry}{packed}"


@dataclass(frozen=True, slots=True)
class RankChunk:
    """A rank's part of a stored tensor, and where its files store it.

    Args:
        rank: the rank.
        name: the name of the stored tensor.
        tensor_map: the part, over the whole tensor.
        stored: the stored bytes.
    """

    rank: int
    name: str
    tensor_map: TensorMap
    stored: StoredTensor

    @property
    def key(self) -> str:
        """The chunk's name, unique in the checkpoint."""
        return f"{self.rank}/{self.name}"


def drop_duplicates(chunks: Iterable[RankChunk]) -> list[RankChunk]:
    """Keep one chunk of each part of a tensor. All others are read, and must have the same bytes.

    Raises:
        MismatchError: two chunks of the same part differ.
    """
    first: dict[TensorMap, RankChunk] = {}
    for chunk in chunks:
        kept = first.setdefault(chunk.tensor_map, chunk)
        if kept is not chunk and not has_same_bytes(kept.stored, chunk.stored):
            raise MismatchError(
                f"{chunk.name!r} should be the same in {kept.stored.file} and in {chunk.stored.file}, but is not",
                hint="give its placement in `plan` if the plan is wrong; or the files belong to several checkpoints",
                name=chunk.name,
                files=[str(kept.stored.file), str(chunk.stored.file)],
            )
    return list(first.values())


def check_tied_chunks(chunks: Sequence[RankChunk], tied_pairs: Mapping[str, str]) -> None:
    """Refuse tied names that are stored with different bytes.

    Args:
        chunks: the chunks of all ranks.
        tied_pairs: each tied name with the name of its target, if both are stored.

    Raises:
        ConversionError: a tied name differs from its target on some rank.
    """
    stored = {(chunk.rank, chunk.name): chunk.stored for chunk in chunks}
    for chunk in chunks:
        target = tied_pairs.get(chunk.name)
        if target is not None and not has_same_bytes(chunk.stored, stored[chunk.rank, target]):
            raise ConversionError(
                f"{chunk.name} is tied to {target} but stored with other values in {chunk.stored.file}",
                hint="set tie_word_embeddings to false in config.json, or save the files with one of the two",
                name=chunk.name,
                tied_to=target,
            )


def reassemble_tensors(chunks: Iterable[RankChunk], shapes: Mapping[str, Shape]) -> dict[str, TensorMap]:
    """Return the maps of the whole stored tensors over the chunks, by the chunks' keys.

    Args:
        chunks: one chunk for each part of each tensor.
        shapes: the shapes of the stored tensors.
    """
    by_name: defaultdict[str, list[tuple[str, TensorMap]]] = defaultdict(list)
    for chunk in chunks:
        by_name[chunk.name].append((chunk.key, chunk.tensor_map))
    return {name: reassemble(shape, by_name[name]) for name, shape in shapes.items()}
