"""Plan the `dcp` layout: each rank's boxes as chunks of shard files that torch and transformers load."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from plans.mesh import Mesh
from plans.placement import Replicate
from runtime.checkpoint.copying.copy_plan import OutputFile, plan_output_file
from runtime.checkpoint.files.file_names import get_shard_file_name
from runtime.checkpoint.files.safetensors import BITS
from runtime.checkpoint.files.sharding_info import build_sharding_metadata
from runtime.checkpoint.manifest import ManifestEntry
from runtime.checkpoint.ranks.files import is_in_rank_file, map_local_tensor
from runtime.tensor_map.tensor_map import TensorMap, narrow, unravel, whole

__all__ = ["iter_rank_chunks", "narrow_to_box", "plan_dcp_files"]


class _PlannedChunk(NamedTuple):
    """A chunk to store: the tensor's name and dtype, where the chunk begins in the tensor, and its tensor map."""

    name: str
    dtype: str
    offset: tuple[int, ...]
    tensor_map: TensorMap


def plan_dcp_files(
    mesh: Mesh, entries: Mapping[str, ManifestEntry], tensor_maps: Mapping[str, TensorMap], tied: Mapping[str, str]
) -> tuple[OutputFile, ...]:
    """Plan all shard files of a checkpoint.

    A file can contain a tensor's name only once, so a rank has as many files as its tensors have boxes: two if gate and
    up are packed. Replicas are written by the first rank that has them, and a rank without chunks has no file. Pipeline
    stages change nothing: a reader looks for a tensor by its name, and each stage reads its own.

    Args:
        mesh: the mesh of the result.
        entries: the manifest entries of all tensors by name.
        tensor_maps: the tensor maps of the whole tensors.
        tied: other names of tensors; their bytes are written again, because readers look under every name.
    """
    names = {name: [name] for name in entries}
    for name, target in tied.items():
        names[target].append(name)
    mesh = mesh.one_replica.one_stage
    ranks = [_plan_rank_files(rank, mesh, entries, tensor_maps, names) for rank in range(mesh.world_size)]
    count = max(map(len, ranks), default=0)
    return tuple(
        _plan_file(get_shard_file_name(rank, number, count), rows)
        for rank, files in enumerate(ranks)
        for number, rows in enumerate(files)
    )


def _plan_file(name: str, rows: Sequence[_PlannedChunk]) -> OutputFile:
    ordered = sorted(rows, key=lambda row: -BITS[row.dtype])
    metadata = build_sharding_metadata({row.name: row.offset for row in ordered})
    return plan_output_file(name, ((row.name, row.dtype, row.tensor_map) for row in ordered), metadata)


def _plan_rank_files(
    rank: int,
    mesh: Mesh,
    entries: Mapping[str, ManifestEntry],
    tensor_maps: Mapping[str, TensorMap],
    names: Mapping[str, Sequence[str]],
) -> list[list[_PlannedChunk]]:
    files: list[list[_PlannedChunk]] = []
    for target, entry in entries.items():
        for number, (offset, shape) in enumerate(iter_rank_chunks(entry, mesh, rank)):
            if number == len(files):
                files.append([])
            tensor_map = narrow_to_box(tensor_maps[target], offset, shape)
            files[number] += (_PlannedChunk(name, entry.dtype, offset, tensor_map) for name in names[target])
    return files


def iter_rank_chunks(entry: ManifestEntry, mesh: Mesh, rank: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Yield the offset and shape of each box of a tensor that a rank's files store."""
    logical = whole("", entry.shape)
    if not logical.boxes:
        yield from [((0,) * len(entry.shape), entry.shape)] if rank == 0 else []
    elif is_in_rank_file(entry, mesh, rank) and _is_first_copy(entry, mesh, rank):
        for box in map_local_tensor(logical, entry, mesh, rank).boxes:
            yield unravel(box.base, entry.shape), box.shape


def _is_first_copy(entry: ManifestEntry, mesh: Mesh, rank: int) -> bool:
    """Return whether the rank is the first on every mesh axis that replicates the tensor."""
    pairs = zip(entry.placements, mesh.coordinates(entry.mesh, rank), strict=True)
    return not any(index for placement, index in pairs if isinstance(placement, Replicate))


def narrow_to_box(tensor_map: TensorMap, offset: Sequence[int], shape: Sequence[int]) -> TensorMap:
    """Return the tensor map of one box of a tensor."""
    for dim, (start, length) in enumerate(zip(offset, shape, strict=True)):
        tensor_map = narrow(tensor_map, dim, start, length)
    return tensor_map
