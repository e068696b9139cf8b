"""Writing the `dcp` layout: each rank's boxes as chunks of shard files that torch and transformers load."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from plans.mesh import Mesh
from plans.placement import Replicate
from runtime.checkpoint.copying.new_file import NewFile, new_file
from runtime.checkpoint.dcp.names import shard_file
from runtime.checkpoint.dcp.safetensors import sharding_metadata
from runtime.checkpoint.files.safetensors import BITS
from runtime.checkpoint.ranks.files import held_by, local
from runtime.checkpoint.record import Entry
from runtime.extents.forms import Form, narrow, unravel, whole

__all__ = ["box_of", "boxes", "dcp_files"]


class _Row(NamedTuple):
    """A chunk that a file will store: the tensor's name and dtype, where the chunk begins in it, its form."""

    name: str
    dtype: str
    offset: tuple[int, ...]
    form: Form


def dcp_files(
    mesh: Mesh, entries: Mapping[str, Entry], forms: Mapping[str, Form], tied: Mapping[str, str]
) -> tuple[NewFile, ...]:
    """Lay out all shard files of a checkpoint.

    A file names a tensor once, so a rank has as many files as a tensor of its own has boxes: two where gate and up are
    packed. What several ranks hold is written by the first of them, and a rank that holds nothing has no file.

    Args:
        mesh: of the result.
        entries: of all tensors by name.
        forms: of the whole tensors.
        tied: other names of tensors; readers look for the bytes under every name.
    """
    names = {name: [name] for name in entries}
    for name, target in tied.items():
        names[target].append(name)
    ranks = [_files_of(rank, mesh, entries, forms, names) for rank in range(mesh.world_size)]
    count = max(map(len, ranks), default=0)
    return tuple(
        _file(shard_file(rank, number, count), rows)
        for rank, files in enumerate(ranks)
        for number, rows in enumerate(files)
    )


def _file(name: str, rows: Sequence[_Row]) -> NewFile:
    ordered = sorted(rows, key=lambda row: -BITS[row.dtype])
    metadata = sharding_metadata({row.name: row.offset for row in ordered})
    return new_file(name, ((row.name, row.dtype, row.form) for row in ordered), metadata)


def _files_of(
    rank: int, mesh: Mesh, entries: Mapping[str, Entry], forms: Mapping[str, Form], names: Mapping[str, Sequence[str]]
) -> list[list[_Row]]:
    files: list[list[_Row]] = []
    for target, entry in entries.items():
        for number, (offset, shape) in enumerate(boxes(entry, mesh, rank)):
            if number == len(files):
                files.append([])
            form = box_of(forms[target], offset, shape)
            files[number] += (_Row(name, entry.dtype, offset, form) for name in names[target])
    return files


def boxes(entry: Entry, mesh: Mesh, rank: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Yield offset and shape of the boxes of a tensor that a rank's files store."""
    logical = whole("", entry.shape)
    if not logical.extents:
        yield from [((0,) * len(entry.shape), entry.shape)] if rank == 0 else []
    elif held_by(entry, rank) and _is_first_copy(entry, mesh, rank):
        for extent in local(logical, entry, mesh, rank).extents:
            yield unravel(extent.base, entry.shape), extent.shape


def _is_first_copy(entry: Entry, mesh: Mesh, rank: int) -> bool:
    """Return whether the rank comes first on every axis that replicates the tensor."""
    pairs = zip(entry.placements, mesh.coordinates(entry.mesh, rank), strict=True)
    return not any(index for placement, index in pairs if isinstance(placement, Replicate))


def box_of(form: Form, offset: Sequence[int], shape: Sequence[int]) -> Form:
    """Return the form of one box of a tensor."""
    for dim, (start, length) in enumerate(zip(offset, shape, strict=True)):
        form = narrow(form, dim, start, length)
    return form
