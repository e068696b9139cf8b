"""The `.distcp` files of a torch distributed checkpoint: the archives in them are found, never loaded."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path

from plans.errors import IncompleteError
from runtime.checkpoint.dcp.archive import BoundedFile, read_archived_tensor
from runtime.checkpoint.dcp.chunks import Chunk
from runtime.checkpoint.dcp.metadata import ChunkMetadata, StorageLocation
from runtime.checkpoint.files.file_names import METADATA
from runtime.checkpoint.files.reading import open_descriptor
from runtime.checkpoint.files.side_files import check_contained

__all__ = ["locate_archive", "open_distcp_file", "read_chunks"]


def read_chunks(folder: Path, metadata: Sequence[ChunkMetadata]) -> list[Chunk]:
    """Return the chunks of a folder's `.distcp` files, found by the headers of their archives.

    Args:
        folder: of the checkpoint.
        metadata: those that are wanted.

    Raises:
        IncompleteError: a file is missing or cut short.
        HeaderError: an archive does not hold what the metadata says.
        CheckpointError: a link leads out of the folder.
    """
    ordered = sorted(metadata, key=lambda box: (box.location.file, box.location.offset))
    return [
        chunk
        for name, group in groupby(ordered, key=lambda box: box.location.file)
        for chunk in _read_file_chunks(folder, name, group)
    ]


@contextmanager
def open_distcp_file(folder: Path, name: str) -> Iterator[BoundedFile]:
    """Give one of a folder's `.distcp` files, whole.

    Raises:
        IncompleteError: it is missing.
        CheckpointError: it is a link that leads out of the folder, or cannot be read.
    """
    path = folder / name
    if not path.is_file():
        raise IncompleteError(
            f"{path}: missing, though {METADATA} names it", hint="copy the missing file", file=str(path)
        )
    check_contained(folder, path)
    with open_descriptor(path) as descriptor:
        yield BoundedFile(descriptor, path, 0, os.fstat(descriptor).st_size)


def locate_archive(location: StorageLocation, file: BoundedFile) -> BoundedFile:
    """Return the part of a file that is an archive.

    Raises:
        IncompleteError: the file ends before it does.
    """
    if location.offset + location.size > file.size:
        raise IncompleteError(
            f"{file.file}: truncated, it has {file.size} bytes of at least {location.offset + location.size}",
            hint="copy or save the file again",
            file=str(file.file),
        )
    return file.slice(location.offset, location.size)


def _read_file_chunks(folder: Path, name: str, metadata: Iterator[ChunkMetadata]) -> Iterator[Chunk]:
    with open_distcp_file(folder, name) as file:
        for box in metadata:
            yield _read_chunk(box, file)


def _read_chunk(metadata: ChunkMetadata, file: BoundedFile) -> Chunk:
    place = metadata.location
    archive = locate_archive(place, file)
    found = read_archived_tensor(archive)
    if (found.storage.dtype, found.shape) != (metadata.dtype, metadata.shape):
        raise archive.error(
            f"is {found.storage.dtype} {list(found.shape)}, where {METADATA} has {metadata.dtype} {list(metadata.shape)} of "
            f"{metadata.name!r}"
        )
    piece = f"{place.file}/{place.offset}"
    return Chunk(metadata.name, metadata.offset, metadata.shape, piece, found.storage, found.base, found.strides)
