"""The `.distcp` files of a torch distributed checkpoint: the archives in them are found, never loaded."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path

from plans.errors import IncompleteError
from runtime.checkpoint.dcp.archive import read_archive
from runtime.checkpoint.dcp.chunks import Chunk
from runtime.checkpoint.dcp.metadata import Box, Place
from runtime.checkpoint.dcp.names import METADATA
from runtime.checkpoint.dcp.zip import Region
from runtime.checkpoint.files.reading import opened
from runtime.checkpoint.files.side_files import check_contained

__all__ = ["archive_at", "read_chunks", "saved_file"]


def read_chunks(folder: Path, boxes: Sequence[Box]) -> list[Chunk]:
    """Return the chunks of a folder's `.distcp` files, found by the headers of their archives.

    Args:
        folder: of the checkpoint.
        boxes: those that are wanted.

    Raises:
        IncompleteError: a file is missing or cut short.
        HeaderError: an archive does not hold what the metadata says.
        CheckpointError: a link leads out of the folder.
    """
    ordered = sorted(boxes, key=lambda box: (box.place.file, box.place.offset))
    return [
        chunk
        for name, group in groupby(ordered, key=lambda box: box.place.file)
        for chunk in _file_chunks(folder, name, group)
    ]


@contextmanager
def saved_file(folder: Path, name: str) -> Iterator[Region]:
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
    with opened(path) as descriptor:
        yield Region(descriptor, path, 0, os.fstat(descriptor).st_size)


def archive_at(place: Place, file: Region) -> Region:
    """Return the part of a file that is an archive.

    Raises:
        IncompleteError: the file ends before it does.
    """
    if place.offset + place.size > file.size:
        raise IncompleteError(
            f"{file.file}: truncated, it has {file.size} bytes of at least {place.offset + place.size}",
            hint="copy or save the file again",
            file=str(file.file),
        )
    return file.part(place.offset, place.size)


def _file_chunks(folder: Path, name: str, boxes: Iterator[Box]) -> Iterator[Chunk]:
    with saved_file(folder, name) as file:
        for box in boxes:
            yield _chunk(box, file)


def _chunk(box: Box, file: Region) -> Chunk:
    place = box.place
    archive = archive_at(place, file)
    found = read_archive(archive)
    if (found.storage.dtype, found.shape) != (box.dtype, box.shape):
        raise archive.error(
            f"is {found.storage.dtype} {list(found.shape)}, where {METADATA} has {box.dtype} {list(box.shape)} of "
            f"{box.name!r}"
        )
    piece = f"{place.file}/{place.offset}"
    return Chunk(box.name, box.offset, box.shape, piece, found.storage, found.base, found.strides)
