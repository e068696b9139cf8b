"""Finding another stack's rank files by their names, and reading their headers."""

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
    """The files of all ranks.

    Args:
        names: the names of the files.
        tensors: the stored tensors by name, for each rank.
    """

    names: frozenset[str]
    tensors: tuple[Mapping[str, StoredTensor], ...]

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """The names of all tensors in the files."""
        return tuple(dict.fromkeys(name for tensors in self.tensors for name in tensors))


def read_external_files(folder: Path, external: ExternalSettings) -> ExternalFiles:
    """Find the files of every rank and read their headers.

    Args:
        folder: the folder of the files.
        external: the pattern of their names, and the number of ranks.

    Raises:
        UsageError: no file matches the pattern, there are too many ranks, or the folder has a manifest.
        IncompleteError: a rank, a part or the end of a file is missing.
        HeaderError: a header is damaged, or two parts contain the same tensor.
        CheckpointError: the folder cannot be read, or a link leads out of it.
    """
    with convert_read_errors(folder):
        if not folder.is_dir():
            raise CheckpointError(
                f"{folder}: not a folder", hint="name the folder with the rank files", folder=str(folder)
            )
        present = sorted(path.name for path in folder.iterdir())
    if MANIFEST in present:
        raise UsageError(
            f"{folder}: has a {MANIFEST}, which already describes its rank files",
            hint="leave `from_pattern` and the settings that belong to it out",
            folder=str(folder),
        )
    by_rank = _group_by_rank(folder, external, present)
    _check_ranks(folder, external, by_rank)
    for rank, parts in by_rank.items():
        _check_parts(folder, external, rank, parts)
    names = frozenset(path.name for parts in by_rank.values() for path in parts.values())
    return ExternalFiles(names, tuple(_read_tensors(folder, by_rank[rank]) for rank in range(external.mesh.world_size)))


def _group_by_rank(folder: Path, external: ExternalSettings, file_names: Sequence[str]) -> Mapping[int, RankParts]:
    """Return the files of each rank. Files whose names give another number of ranks are left out."""
    matching = {name: parsed for name in file_names if (parsed := external.from_pattern.parse(name)) is not None}
    world = external.mesh.world_size
    by_rank: defaultdict[int, dict[int, Path]] = defaultdict(dict)
    for name, parsed in matching.items():
        if parsed.world in (None, world):
            by_rank[parsed.rank][parsed.part or 0] = folder / name
    if not by_rank and matching:
        worlds = sorted({str(parsed.world) for parsed in matching.values()})
        raise UsageError(
            f"{folder}: has files of {' and '.join(worlds)} ranks, not of {world}",
            hint="correct `from_tp` and `from_ep`",
            files=list(matching),
        )
    if not by_rank:
        others = [name for name in file_names if name.endswith(".safetensors")] or file_names
        raise UsageError(
            f"{folder}: no file matches {shorten(str(external.from_pattern))}, "
            f"the folder has {format_names(others) if others else 'no files'}",
            hint="correct `from_pattern`",
            files=others,
        )
    return by_rank


def _check_ranks(folder: Path, external: ExternalSettings, files_by_rank: Mapping[int, RankParts]) -> None:
    world = external.mesh.world_size
    surplus = sorted(rank for rank in files_by_rank if rank >= world)
    if surplus:
        names = [path.name for rank in surplus for path in files_by_rank[rank].values()]
        raise UsageError(
            f"{folder}: {format_names(names)} would belong to rank {surplus[0]}, but the ranks are 0 to {world - 1}",
            hint="correct `from_tp` and `from_ep`, or move files of another checkpoint away",
            files=names,
        )
    if len(files_by_rank) < world:
        absent = next(rank for rank in range(world) if rank not in files_by_rank)
        raise IncompleteError(
            f"{folder}: {world - len(files_by_rank)} of {world} ranks have no file, the first is rank {absent}",
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
                    hint="the files belong to several checkpoints; move those of the others away",
                    tensor=name,
                )
            tensors[name] = tensor
    return tensors
