"""The `ranks` layout: one safetensors file per rank, with the rank's local tensors exactly as in its memory.

Replicas hold the same bytes and share their files: there are as many as one replica has ranks. The files of different
pipeline stages hold different tensors.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from plans.errors import IncompleteError, MismatchError
from plans.mesh import Mesh, MeshName
from plans.placement import Placement, Replicate
from runtime.checkpoint.checkpoint import Checkpoint, TensorCopy, TensorInfo
from runtime.checkpoint.copying.copy_plan import OutputFile, plan_output_file
from runtime.checkpoint.files.file_names import MANIFEST
from runtime.checkpoint.files.safetensors import BITS, Header, read_header
from runtime.checkpoint.files.side_files import check_contained, find_side_files
from runtime.checkpoint.manifest import Manifest, ManifestEntry
from runtime.tensor_map.tensor_map import TensorMap, reassemble, shard_for_rank, whole

__all__ = [
    "find_copies",
    "group_ranks_by_copy",
    "is_in_rank_file",
    "map_local_tensor",
    "plan_rank_file",
    "rank_file_name",
    "read_rank_checkpoint",
    "read_rank_header",
]


def rank_file_name(rank: int, world_size: int) -> str:
    """Return the name of a rank's file, such as `rank-00000-of-00002.safetensors`."""
    return f"rank-{rank:05d}-of-{world_size:05d}.safetensors"


def is_in_rank_file(entry: ManifestEntry, mesh: Mesh, rank: int) -> bool:
    """Return whether a rank's file stores the tensor; carried tensors are stored by rank 0 alone."""
    return mesh.holds(rank, entry.stages) and (rank == 0 or entry.kind != "carried")


def map_local_tensor(tensor_map: TensorMap, entry: ManifestEntry, mesh: Mesh, rank: int) -> TensorMap:
    """Return the map of a rank's local tensor.

    Args:
        tensor_map: the map of the whole tensor.
        entry: the tensor's manifest entry.
        mesh: the checkpoint's mesh.
        rank: the rank that holds the local tensor.
    """
    return shard_for_rank(tensor_map, entry.placements, mesh.sizes(entry.mesh), mesh.coordinates(entry.mesh, rank))


def plan_rank_file(
    rank: int, mesh: Mesh, entries: Mapping[str, ManifestEntry], tensor_maps: Mapping[str, TensorMap]
) -> OutputFile:
    """Plan a rank's file. Tensors of wider elements come first, so that each is aligned to its own element size.

    Args:
        rank: the rank of one replica that the file is for.
        mesh: the mesh of one replica of the result.
        entries: the manifest entries of all tensors by name.
        tensor_maps: the maps of the whole tensors by name.
    """
    names = [name for name, entry in entries.items() if is_in_rank_file(entry, mesh, rank)]
    names.sort(key=lambda name: -BITS[entries[name].dtype])
    rows = (
        (name, entries[name].dtype, map_local_tensor(tensor_maps[name], entries[name], mesh, rank)) for name in names
    )
    return plan_output_file(rank_file_name(rank, mesh.world_size), rows, {"format": "pt"})


def group_ranks_by_copy(
    placements: tuple[Placement, ...], mesh: Mesh, axes: MeshName, stages: tuple[int, ...] = ()
) -> list[tuple[int, ...]]:
    """Return the ranks that together hold each copy of a tensor, the copy of the lowest ranks first.

    Ranks at the same coordinates of the axes that replicate a tensor hold different parts of the same copy.

    Args:
        placements: the tensor's placement on each mesh axis.
        mesh: the mesh that the tensor is placed on.
        axes: the view of the mesh that the placements refer to.
        stages: the pipeline stages that hold the tensor; empty if the mesh has only one.
    """
    copies: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)
    for rank in (rank for rank in range(mesh.world_size) if mesh.holds(rank, stages)):
        coordinates = zip(placements, mesh.coordinates(axes, rank), strict=True)
        replicated = (index for placement, index in coordinates if isinstance(placement, Replicate))
        copies[mesh.find_stage(rank), mesh.find_replica(rank), *replicated].append(rank)
    return [tuple(ranks) for ranks in copies.values()]


def find_copies(manifest: Manifest, name: str) -> Iterator[TensorCopy]:
    """Yield the copies of a tensor in rank files, over local tensors named `rank/name`, the lowest ranks' first."""
    entry, mesh = manifest.tensors[name], manifest.mesh.one_replica
    logical = whole(name, entry.shape)
    copies = group_ranks_by_copy(entry.placements, mesh, entry.mesh, entry.stages)
    for ranks in [(0,)] if entry.kind == "carried" else copies:
        shards = ((f"{rank}/{name}", map_local_tensor(logical, entry, mesh, rank)) for rank in ranks)
        yield TensorCopy(name, reassemble(entry.shape, shards), ranks)


def read_rank_checkpoint(folder: Path, manifest: Manifest) -> Checkpoint:
    """Read a folder of rank files up to their headers; every tensor is mapped onto the first of its copies.

    Raises:
        IncompleteError: a file is missing or truncated.
        HeaderError: a header is damaged.
        MismatchError: a file does not contain what the manifest records.
    """
    headers = [read_rank_header(folder, manifest, rank) for rank in range(manifest.mesh.one_replica.world_size)]
    return Checkpoint(
        folder=folder,
        layout="ranks",
        tensors={name: TensorInfo(entry.kind, entry.dtype, entry.shape) for name, entry in manifest.tensors.items()},
        tied=manifest.tied,
        tensor_maps={name: next(find_copies(manifest, name)).tensor_map for name in manifest.tensors},
        chunks={
            f"{rank}/{name}": tensor for rank, header in enumerate(headers) for name, tensor in header.tensors.items()
        },
        side_files=find_side_files(folder, {MANIFEST, *(header.file.name for header in headers)}),
        manifest=manifest,
        find_stored_form=lambda: manifest.stored_form,
    )


def read_rank_header(folder: Path, manifest: Manifest, rank: int) -> Header:
    """Read the header of a rank's file and check it against the manifest; its tensors get the manifest's names.

    Raises:
        IncompleteError: the file is missing or truncated.
        HeaderError: the header is damaged.
        MismatchError: the file does not contain what the manifest records.
    """
    mesh, rank = manifest.mesh.one_replica, manifest.mesh.find_file(rank)
    path = folder / rank_file_name(rank, mesh.world_size)
    if not path.is_file():
        raise IncompleteError(f"{path}: missing", hint="copy the missing file or reshard again", file=str(path))
    check_contained(folder, path)
    header = _rename_tensors(read_header(path), manifest.stored_names)
    expected = {name: entry for name, entry in manifest.tensors.items() if is_in_rank_file(entry, mesh, rank)}
    for name in sorted(expected.keys() ^ header.tensors.keys()):
        where = "missing from" if name in expected else "not in the manifest but in"
        raise _mismatch_error(path, f"{name!r} is {where} the file")
    for name, entry in expected.items():
        shape = map_local_tensor(whole(name, entry.shape), entry, mesh, rank).shape
        tensor = header.tensors[name]
        if (tensor.dtype, tensor.shape) != (entry.dtype, shape):
            raise _mismatch_error(
                path,
                f"{name!r} is {tensor.dtype} {list(tensor.shape)}, but {entry.dtype} {list(shape)} by the manifest",
            )
    return header


def _rename_tensors(header: Header, stored_names: Mapping[str, str]) -> Header:
    names = {stored: name for name, stored in stored_names.items()}
    return replace(header, tensors={names.get(name, name): tensor for name, tensor in header.tensors.items()})


def _mismatch_error(path: Path, what: str) -> MismatchError:
    hint = "the file belongs to another checkpoint; reshard again"
    return MismatchError(f"{path}: {what}", hint=hint, file=str(path))
