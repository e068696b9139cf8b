"""The `ranks` layout: one safetensors file per rank with its local tensors exactly as in its memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from plans.errors import IncompleteError, MismatchError
from plans.mesh import Mesh
from plans.placement import Replicate
from runtime.checkpoint.checkpoint import Checkpoint, TensorInfo
from runtime.checkpoint.copying.output_file import OutputFile, plan_output_file
from runtime.checkpoint.files.safetensors import BITS, Header, StoredTensor, read_header
from runtime.checkpoint.files.side_files import check_contained, find_side_files
from runtime.checkpoint.ranks.manifest import read_manifest
from runtime.checkpoint.record import MANIFEST, Manifest, ManifestEntry
from runtime.tensor_map.shards import reassemble, shard_for_rank
from runtime.tensor_map.tensor_map import TensorMap, whole

__all__ = [
    "RankCheckpoint",
    "RankCopy",
    "is_in_rank_file",
    "map_local_tensor",
    "plan_rank_file",
    "rank_file_name",
    "read_rank_header",
]


def rank_file_name(rank: int, world_size: int) -> str:
    """Return the name of a rank's file, `rank-00000-of-00002.safetensors`."""
    return f"rank-{rank:05d}-of-{world_size:05d}.safetensors"


def is_in_rank_file(entry: ManifestEntry, rank: int) -> bool:
    """Return whether the rank's file has the tensor; carried tensors lie in rank 0's alone."""
    return rank == 0 or entry.kind != "carried"


def map_local_tensor(tensor_map: TensorMap, entry: ManifestEntry, mesh: Mesh, rank: int) -> TensorMap:
    """Return the form of what a rank holds of a tensor.

    Args:
        tensor_map: of the whole tensor.
        entry: its manifest entry.
        mesh: of the checkpoint.
        rank: whose local tensor.
    """
    return shard_for_rank(tensor_map, entry.placements, mesh.sizes(entry.mesh), mesh.coordinates(entry.mesh, rank))


def plan_rank_file(
    rank: int, mesh: Mesh, entries: Mapping[str, ManifestEntry], tensor_maps: Mapping[str, TensorMap]
) -> OutputFile:
    """Lay out one rank's file: widest elements first, so that every tensor is aligned to its own.

    Args:
        rank: whose file.
        mesh: of the result.
        entries: of all tensors by name.
        tensor_maps: of the whole tensors.
    """
    names = sorted(
        (name for name in entries if is_in_rank_file(entries[name], rank)), key=lambda n: -BITS[entries[n].dtype]
    )
    rows = (
        (name, entries[name].dtype, map_local_tensor(tensor_maps[name], entries[name], mesh, rank)) for name in names
    )
    return plan_output_file(rank_file_name(rank, mesh.world_size), rows, {"format": "pt"})


@dataclass(frozen=True)
class RankCopy:
    """One of the copies of a tensor that rank files hold.

    Args:
        name: of the tensor.
        ranks: whose files together hold it once; one rank where it is whole there.
    """

    name: str
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class RankCheckpoint:
    """A folder of rank files, its manifest and headers read and found to agree.

    Args:
        folder: where it lies.
        manifest: what it says about itself.
        headers: of the rank files, by rank.
    """

    folder: Path
    manifest: Manifest
    headers: tuple[Header, ...]

    @classmethod
    def read(cls, folder: Path) -> RankCheckpoint:
        """Read the manifest and every header, no tensor.

        Raises:
            IncompleteError: a file is missing or cut short.
            HeaderError: a header or the manifest lies.
            MismatchError: a file does not hold what the manifest says.
        """
        manifest = read_manifest(folder)
        headers = tuple(read_rank_header(folder, manifest, rank) for rank in range(manifest.mesh.world_size))
        return cls(folder, manifest, headers)

    def find_copies(self, name: str) -> list[RankCopy]:
        """Return all copies of a tensor, that of the first ranks first."""
        entry, mesh = self.manifest.tensors[name], self.manifest.mesh
        copies: dict[tuple[int, ...], list[int]] = {}
        for rank in range(mesh.world_size):
            if is_in_rank_file(entry, rank):
                copies.setdefault(_find_replica(entry, mesh, rank), []).append(rank)
        return [RankCopy(name, tuple(ranks)) for ranks in copies.values()]

    def build_tensor_map(self, copy: RankCopy) -> TensorMap:
        """Return the form of a whole tensor over the local tensors of one copy, named `rank/name`."""
        name, entry = copy.name, self.manifest.tensors[copy.name]
        logical = whole(name, entry.shape)
        pieces = ((f"{rank}/{name}", map_local_tensor(logical, entry, self.manifest.mesh, rank)) for rank in copy.ranks)
        return reassemble(entry.shape, pieces)

    def to_checkpoint(self) -> Checkpoint:
        """Return the whole tensors over the first copy of each."""
        entries = self.manifest.tensors
        forms = {name: self.build_tensor_map(self.find_copies(name)[0]) for name in entries}
        pieces = {
            f"{rank}/{name}": tensor
            for rank, header in enumerate(self.headers)
            for name, tensor in header.tensors.items()
        }
        used = {MANIFEST, *(header.file.name for header in self.headers)}
        return Checkpoint(
            folder=self.folder,
            layout="ranks",
            tensors={name: TensorInfo(entry.kind, entry.dtype, entry.shape) for name, entry in entries.items()},
            tied=self.manifest.tied,
            tensor_maps=forms,
            chunks=pieces,
            side_files=find_side_files(self.folder, used),
            stored_form=self.manifest.stored_form,
            digests={name: entry.digest for name, entry in entries.items()},
            config=self.manifest.config,
        )

    def get_local_tensor(self, key: str) -> StoredTensor:
        """Return the local tensor that a form names."""
        rank, _, name = key.partition("/")
        return self.headers[int(rank)].tensors[name]


def _find_replica(entry: ManifestEntry, mesh: Mesh, rank: int) -> tuple[int, ...]:
    """Return which copy of a tensor a rank has a part of: its place on the axes that replicate the tensor."""
    pairs = zip(entry.placements, mesh.coordinates(entry.mesh, rank), strict=True)
    return tuple(index for placement, index in pairs if isinstance(placement, Replicate))


def read_rank_header(folder: Path, manifest: Manifest, rank: int) -> Header:
    """Read the header of one rank's file and hold it against the manifest.

    Raises:
        IncompleteError: the file is missing or cut short.
        HeaderError: the header lies.
        MismatchError: the file does not hold what the manifest says.
    """
    path = folder / rank_file_name(rank, manifest.mesh.world_size)
    if not path.is_file():
        raise IncompleteError(f"{path}: missing", hint="copy the missing file or reshard again", file=str(path))
    check_contained(folder, path)
    header = read_header(path)
    expected = {name: entry for name, entry in manifest.tensors.items() if is_in_rank_file(entry, rank)}
    for name in sorted(expected.keys() ^ header.tensors.keys()):
        where = "missing from" if name in expected else "not in the manifest but in"
        raise _mismatch_error(path, f"{name!r} is {where} the file")
    for name, entry in expected.items():
        shape = map_local_tensor(whole(name, entry.shape), entry, manifest.mesh, rank).shape
        tensor = header.tensors[name]
        if (tensor.dtype, tensor.shape) != (entry.dtype, shape):
            said = f"{entry.dtype} {list(shape)}"
            raise _mismatch_error(
                path, f"{name!r} is {tensor.dtype} {list(tensor.shape)} where the manifest says {said}"
            )
    return header


def _mismatch_error(path: Path, what: str) -> MismatchError:
    hint = "the file belongs to another checkpoint; reshard again"
    return MismatchError(f"{path}: {what}", hint=hint, file=str(path))
