"""Writing a folder's files: created at full size, filled by sinks, synced."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

from runtime.checkpoint.commit import sync
from runtime.checkpoint.copy import Bytes, Destination, Sink
from runtime.checkpoint.digest import Digest

__all__ = ["copy_files", "created", "file_sink", "sinks_for", "write_file"]


@contextmanager
def created(folder: Path, files: Mapping[str, tuple[int, bytes]]) -> Iterator[dict[str, int]]:
    """Create files at their full size, and give their descriptors by name.

    Args:
        folder: must not have them yet.
        files: by name, the size in bytes and the first bytes.
    """
    with ExitStack() as stack:
        descriptors: dict[str, int] = {}
        for name, (size, header) in files.items():
            descriptor = os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            stack.callback(os.close, descriptor)
            os.truncate(descriptor, size)
            file_sink(descriptor, 0)(0, np.frombuffer(header, np.uint8))
            descriptors[name] = descriptor
        yield descriptors


def sinks_for(
    destinations: Sequence[Destination], descriptors: Mapping[str, int], digests: Sequence[Digest]
) -> list[Sink]:
    """Return what takes each destination's bytes: its file, or the next of the digests where it has none."""
    remaining = iter(digests)

    def sink(destination: Destination) -> Sink:
        if destination.file is None:
            return next(remaining).add
        return file_sink(descriptors[destination.file], destination.offset)

    return [sink(destination) for destination in destinations]


def file_sink(descriptor: int, base: int) -> Sink:
    """Return a sink that writes a region beginning at `base` of an open file."""

    def write(offset: int, piece: Bytes) -> None:
        view = piece.data
        done = 0
        while done < len(view):
            done += os.pwrite(descriptor, view[done:], base + offset + done)

    return write


def copy_files(source: Path, names: Iterable[str], target: Path) -> None:
    """Copy files' content to new files, and sync them and the subfolders made for them.

    Args:
        source: a folder.
        names: of files in it or in its subfolders.
        target: a folder that has none of them.
    """
    made: set[Path] = set()
    for name in names:
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        made |= {target / part for part in Path(name).parents}
        with (source / name).open("rb") as reader, path.open("xb") as stream:
            shutil.copyfileobj(reader, stream)
        sync(path)
    for folder in made:
        sync(folder)


def write_file(path: Path, content: bytes) -> None:
    """Write a new file and sync it."""
    with path.open("xb") as stream:
        stream.write(content)
    sync(path)
