"""The files of foreign ranks: every rank there, none over, each read up to its headers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from plans.errors import CheckpointError, HeaderError, IncompleteError, UsageError
from plans.text import format_names, shorten
from runtime.checkpoint.external.source import ExternalSettings
from runtime.checkpoint.files.file_names import MANIFEST
from runtime.checkpoint.files.reading import convert_read_errors
from runtime.checkpoint.files.safetensors import StoredTensor, read_header
from runtime.checkpoint.files.side_files import check_contained

__all__ = ["ExternalFiles", "read_external_files"]

RankParts = Mapping[int, Path]
"""A rank's files by their number."""


@dataclass(frozen=True)
class ExternalFiles:
    """What the files of all ranks hold.

    Args:
        names: of the files.
        tensors: by name, for each rank.
    """

    names: frozenset[str]
    tensors: tuple[Mapping[str, StoredTensor], ...]

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """The names of tensors in any of the files."""
        return tuple(dict.fromkeys(name for tensors in self.tensors for name in tensors))


def read_external_files(folder: Path, external: ExternalSettings) -> ExternalFiles:
    """Find the files of every rank and read their headers, no tensor.

    Args:
        folder: where they lie.
        external: how they are named, and of how many ranks they are.

    Raises:
        UsageError: no file has such a name, there are more ranks, or the folder has a manifest.
        IncompleteError: a rank, a part or the end of a file is missing.
        HeaderError: a header lies, or two parts hold one tensor.
        CheckpointError: the folder cannot be read, or a link leads out of it.
    """
    with convert_read_errors(folder):
        if not folder.is_dir():
            raise CheckpointError(
                f"{folder}: not a folder", hint="name the folder that holds the rank files", folder=str(folder)
            )
        present = sorted(path.name for path in folder.iterdir())
    if MANIFEST in present:
        raise UsageError(
            f"{folder}: has a {MANIFEST}, which says what `from_pattern` would",
            hint="leave `from_pattern` and the settings that belong to it out",
            folder=str(folder),
        )
    found = _group_by_rank(folder, external, present)
    _check_ranks(folder, external, found)
    for rank, parts in found.items():
        _check_parts(folder, external, rank, parts)
    names = frozenset(path.name for parts in found.values() for path in parts.values())
    return ExternalFiles(names, tuple(_read_tensors(folder, found[rank]) for rank in range(external.mesh.world_size)))


def _group_by_rank(folder: Path, external: ExternalSettings, file_names: Sequence[str]) -> Mapping[int, RankParts]:
    """Return the files of each rank; where names tell the number of ranks, those of another one are no part of it."""
    read = {name: said for name in file_names if (said := external.from_pattern.parse(name)) is not None}
    world = external.mesh.world_size
    found: defaultdict[int, dict[int, Path]] = defaultdict(dict)
    for name, said in read.items():
        if said.world in (None, world):
            found[said.rank][said.part or 0] = folder / name
    if not found and read:
        worlds = sorted({str(said.world) for said in read.values()})
        raise UsageError(
            f"{folder}: has files of {' and '.join(worlds)} ranks, not of {world}",
            hint="correct `from_tp` and `from_ep`",
            files=list(read),
        )
    if not found:
        held = [name for name in file_names if name.endswith(".safetensors")] or file_names
        raise UsageError(
            f"{folder}: no file is named like {shorten(str(external.from_pattern))}, "
            f"it has {format_names(held) if held else 'nothing'}",
            hint="correct `from_pattern`",
            files=held,
        )
    return found


def _check_ranks(folder: Path, external: ExternalSettings, files_by_rank: Mapping[int, RankParts]) -> None:
    world = external.mesh.world_size
    over = sorted(rank for rank in files_by_rank if rank >= world)
    if over:
        names = [path.name for rank in over for path in files_by_rank[rank].values()]
        raise UsageError(
            f"{folder}: {format_names(names)} would be of rank {over[0]}, but {world} ranks are numbered 0 to {world - 1}",
            hint="correct `from_tp` and `from_ep`, or move files of another checkpoint away",
            files=names,
        )
    if len(files_by_rank) < world:
        absent = next(rank for rank in range(world) if rank not in files_by_rank)
        raise IncompleteError(
            f"{folder}: {world - len(files_by_rank)} of {world} ranks have no file, rank {absent} is the first",
            hint="copy the missing files, or correct `from_tp` and `from_ep`",
            rank=absent,
        )


def _check_parts(folder: Path, external: ExternalSettings, rank: int, parts: RankParts) -> None:
    first = min(parts)
    if external.from_pattern.has_parts and (first > 1 or max(parts) - first + 1 > len(parts)):
        absent = 0 if first > 1 else next(part for part in range(first, max(parts)) if part not in parts)
        raise IncompleteError(
            f"{folder}: part {absent} of rank {rank} is missing",
            hint="copy the missing files",
            rank=rank,
            part=absent,
        )


def _read_tensors(folder: Path, parts: RankParts) -> Mapping[str, StoredTensor]:
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
