"""The files of a torch distributed checkpoint, and the chunks they store: shard files or `.distcp` files.

Shard files are safetensors files with sharding metadata in their headers. A `.distcp` file is a sequence of archives
that `torch.save` wrote; they are located, never loaded.

Source: `torch.distributed.checkpoint.hf_storage` and `.filesystem` of torch 2.13.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path

from plans.errors import IncompleteError
from runtime.checkpoint.dcp.chunks import Chunk
from runtime.checkpoint.dcp.metadata import ChunkMetadata, StorageLocation
from runtime.checkpoint.files.file_names import METADATA
from runtime.checkpoint.files.reading import open_descriptor, open_regular
from runtime.checkpoint.files.safetensors import read_header
from runtime.checkpoint.files.sharding_info import read_offsets
from runtime.checkpoint.files.side_files import check_contained
from runtime.checkpoint.pickled.archive import BoundedFile
from runtime.checkpoint.pickled.tensors import read_archived_tensor
from runtime.formats import PREFIX_BYTES, check_not_other_format

__all__ = ["locate_archive", "open_distcp_file", "read_chunks", "read_shard_files"]


def read_shard_files(folder: Path, names: Sequence[str]) -> list[Chunk]:
    """Return the chunks that shard files store.

    Args:
        folder: the checkpoint's folder.
        names: the names of its shard files.

    Raises:
        HeaderError: a header or its sharding metadata is wrong.
        IncompleteError: a file is truncated.
        CheckpointError: a link leads out of the folder.
    """
    return [chunk for name in names for chunk in _read_shard_file(folder, folder / name)]


def _read_shard_file(folder: Path, path: Path) -> list[Chunk]:
    check_contained(folder, path)
    if not path.is_file():
        raise IncompleteError(f"{path}: not a file", hint="copy the file again", file=str(path))
    header = read_header(path)
    offsets = read_offsets(header)
    return [
        Chunk.contiguous(name, offsets[name] if offsets else (0,) * len(stored.shape), f"{path.name}/{name}", stored)
        for name, stored in header.tensors.items()
    ]


def read_chunks(folder: Path, metadata: Sequence[ChunkMetadata]) -> list[Chunk]:
    """Return the chunks that a folder's `.distcp` files store, located by the headers of their archives.

    Args:
        folder: the checkpoint's folder.
        metadata: the metadata of the wanted chunks.

    Raises:
        IncompleteError: a file is missing or truncated.
        HeaderError: an archive does not contain what the metadata describes.
        CheckpointError: a link leads out of the folder.
    """
    ordered = sorted(metadata, key=lambda chunk: (chunk.location.file, chunk.location.offset))
    chunks: list[Chunk] = []
    for name, group in groupby(ordered, key=lambda chunk: chunk.location.file):
        with open_distcp_file(folder, name) as file:
            chunks += (_read_chunk(chunk, file) for chunk in group)
    return chunks


@contextmanager
def open_distcp_file(folder: Path, name: str) -> Iterator[BoundedFile]:
    """Open one of a folder's `.distcp` files.

    Raises:
        IncompleteError: the file is missing.
        CheckpointError: it is a link that leads out of the folder, or it cannot be read.
    """
    path = folder / name
    if not path.is_file():
        raise IncompleteError(
            f"{path}: missing, though {METADATA} names it", hint="copy the missing file", file=str(path)
        )
    check_contained(folder, path)
    with open_regular(path) as stream:
        start = stream.read(PREFIX_BYTES)
    if not start.startswith(b"PK"):  # the mark of the archives that torch.save writes
        check_not_other_format(path, start)
    with open_descriptor(path) as descriptor:
        yield BoundedFile(descriptor, path, 0, os.fstat(descriptor).st_size)


def locate_archive(location: StorageLocation, file: BoundedFile) -> BoundedFile:
    """Return the part of a `.distcp` file that is an archive.

    Raises:
        IncompleteError: the file ends before the archive does.
    """
    if location.offset + location.size > file.size:
        raise IncompleteError(
            f"{file.file}: truncated, it has {file.size} bytes of at least {location.offset + location.size}",
            hint="copy or save the file again",
            file=str(file.file),
        )
    return file.slice(location.offset, location.size)


def _read_chunk(metadata: ChunkMetadata, file: BoundedFile) -> Chunk:
    location = metadata.location
    archive = locate_archive(location, file)
    tensor = read_archived_tensor(archive)
    if (tensor.storage.dtype, tensor.shape) != (metadata.dtype, metadata.shape):
        raise archive.error(
            f"is {tensor.storage.dtype} {list(tensor.shape)}, but {METADATA} lists {metadata.dtype} "
            f"{list(metadata.shape)} for {metadata.name!r}"
        )
    stored_name = f"{location.file}/{location.offset}"
    return Chunk(
        metadata.name, metadata.offset, metadata.shape, stored_name, tensor.storage, tensor.base, tensor.strides
    )
