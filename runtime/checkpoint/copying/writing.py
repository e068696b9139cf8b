"""Writing a folder's files: created at full size, then filled by regions, side files copied, all of it synced."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from runtime.checkpoint.copying.commit import sync
from runtime.checkpoint.copying.copy_plan import Destination
from runtime.checkpoint.copying.regions import DigestRegion, FileRegion, Region
from runtime.checkpoint.digest import Digest
from runtime.checkpoint.files.open_files import OpenFiles
from runtime.checkpoint.files.reading import convert_read_errors

__all__ = ["allocate_files", "build_regions", "copy_files", "write_file"]

_PART = 2**20


def allocate_files(folder: Path, files: Mapping[str, tuple[int, Mapping[int, bytes]]]) -> None:
    """Bring files to their full size and write the bytes that are known already; what else they hold stays.

    Args:
        folder: may have some of them from an earlier run.
        files: by name, the size in bytes and what is known, by its offset.
    """
    with OpenFiles(folder) as opened:
        for name, (size, fixed) in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).touch(mode=0o644)
            os.truncate(folder / name, size)
            region = FileRegion(opened, name, 0)
            for offset, content in fixed.items():
                region.write(offset, np.frombuffer(content, np.uint8))


def build_regions(destinations: Sequence[Destination], files: OpenFiles, digests: Sequence[Digest]) -> list[Region]:
    """Return what takes each destination's bytes: its file, or the next of the digests where it has none."""
    remaining = iter(digests)
    return [
        DigestRegion(next(remaining)) if at.file is None else FileRegion(files, at.file, at.offset)
        for at in destinations
    ]


def copy_files(source: Path, names: Iterable[str], target: Path) -> None:
    """Copy files' content, over what an earlier run left, and sync them and the subfolders made for them.

    Args:
        source: a folder.
        names: of files in it or in its subfolders.
        target: the folder that gets them.

    Raises:
        CheckpointError: one of the source's cannot be read.
    """
    made: set[Path] = set()
    for name in names:
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        made |= {target / part for part in Path(name).parents}
        with path.open("wb") as stream:
            stream.writelines(_read_parts(source / name))
        sync(path)
    for folder in made:
        sync(folder)


def write_file(path: Path, content: bytes) -> None:
    """Write a file, whatever an earlier run left there, and sync it."""
    with path.open("wb") as stream:
        stream.write(content)
    sync(path)


def _read_parts(path: Path) -> Iterator[bytes]:
    """Yield a file's content; what reading says is not to be taken for what writing says."""
    with convert_read_errors(path), path.open("rb") as stream:
        while part := stream.read(_PART):
            yield part
