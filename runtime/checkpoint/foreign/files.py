"""The files of foreign ranks: every rank there, none over, each read up to its headers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from plans.errors import CheckpointError, HeaderError, IncompleteError, UsageError
from runtime.checkpoint.files.reading import reading
from runtime.checkpoint.files.safetensors import StoredTensor, read_header
from runtime.checkpoint.files.side_files import check_contained
from runtime.checkpoint.foreign.source import Foreign
from runtime.checkpoint.record import MANIFEST
from runtime.wording import listed, shortened

__all__ = ["RankFiles", "read_rank_files"]

Parts = Mapping[int, Path]
"""A rank's files by their number."""


@dataclass(frozen=True)
class RankFiles:
    """What the files of all ranks hold.

    Args:
        names: of the files.
        tensors: by name, for each rank.
    """

    names: frozenset[str]
    tensors: tuple[Mapping[str, StoredTensor], ...]

    @property
    def stored(self) -> tuple[str, ...]:
        """The names of tensors in any of the files."""
        return tuple(dict.fromkeys(name for tensors in self.tensors for name in tensors))


def read_rank_files(folder: Path, foreign: Foreign) -> RankFiles:
    """Find the files of every rank and read their headers, no tensor.

    Args:
        folder: where they lie.
        foreign: how they are named, and of how many ranks they are.

    Raises:
        UsageError: no file has such a name, there are more ranks, or the folder has a manifest.
        IncompleteError: a rank, a part or the end of a file is missing.
        HeaderError: a header lies, or two parts hold one tensor.
        CheckpointError: the folder cannot be read, or a link leads out of it.
    """
    with reading(folder):
        if not folder.is_dir():
            raise CheckpointError(
                f"{folder}: not a folder", hint="name the folder that holds the rank files", folder=str(folder)
            )
        present = sorted(path.name for path in folder.iterdir())
    if MANIFEST in present:
        raise UsageError(
            f"{folder}: has a {MANIFEST}, which says what --from-pattern would",
            hint="leave --from-pattern and what belongs to it out",
            folder=str(folder),
        )
    found = _by_rank(folder, foreign, present)
    _check_ranks(folder, foreign, found)
    for rank, parts in found.items():
        _check_parts(folder, foreign, rank, parts)
    names = frozenset(path.name for parts in found.values() for path in parts.values())
    return RankFiles(names, tuple(_tensors(folder, found[rank]) for rank in range(foreign.mesh.world_size)))


def _by_rank(folder: Path, foreign: Foreign, present: Sequence[str]) -> Mapping[int, Parts]:
    """Return the files of each rank; where names tell the number of ranks, those of another one are no part of it."""
    read = {name: said for name in present if (said := foreign.pattern.read(name)) is not None}
    world = foreign.mesh.world_size
    found: defaultdict[int, dict[int, Path]] = defaultdict(dict)
    for name, said in read.items():
        if said.world in (None, world):
            found[said.rank][said.part or 0] = folder / name
    if not found and read:
        worlds = sorted({str(said.world) for said in read.values()})
        raise UsageError(
            f"{folder}: has files of {' and '.join(worlds)} ranks, not of {world}",
            hint="correct --from-tp and --from-ep",
            files=list(read),
        )
    if not found:
        held = [name for name in present if name.endswith(".safetensors")] or present
        raise UsageError(
            f"{folder}: no file is named like {shortened(str(foreign.pattern))}, "
            f"it has {listed(held) if held else 'nothing'}",
            hint="correct --from-pattern",
            files=held,
        )
    return found


def _check_ranks(folder: Path, foreign: Foreign, found: Mapping[int, Parts]) -> None:
    world = foreign.mesh.world_size
    over = sorted(rank for rank in found if rank >= world)
    if over:
        names = [path.name for rank in over for path in found[rank].values()]
        raise UsageError(
            f"{folder}: {listed(names)} would be of rank {over[0]}, but {world} ranks are numbered 0 to {world - 1}",
            hint="correct --from-tp and --from-ep, or move files of another checkpoint away",
            files=names,
        )
    if len(found) < world:
        absent = next(rank for rank in range(world) if rank not in found)
        raise IncompleteError(
            f"{folder}: {world - len(found)} of {world} ranks have no file, rank {absent} is the first",
            hint="copy the missing files, or correct --from-tp and --from-ep",
            rank=absent,
        )


def _check_parts(folder: Path, foreign: Foreign, rank: int, parts: Parts) -> None:
    first = min(parts)
    if foreign.pattern.has_parts and (first > 1 or max(parts) - first + 1 > len(parts)):
        absent = 0 if first > 1 else next(part for part in range(first, max(parts)) if part not in parts)
        raise IncompleteError(
            f"{folder}: part {absent} of rank {rank} is missing",
            hint="copy the missing files",
            rank=rank,
            part=absent,
        )


def _tensors(folder: Path, parts: Parts) -> Mapping[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for _, path in sorted(parts.items()):
        check_contained(folder, path)
        for name, tensor in read_header(path).tensors.items():
            if name in tensors:
                raise HeaderError(
                    f"{path}: tensor {name!r} is also in {tensors[name].file.name}",
                    hint="the files belong to several checkpoints; move those of another one away",
                    tensor=name,
                )
            tensors[name] = tensor
    return tensors
