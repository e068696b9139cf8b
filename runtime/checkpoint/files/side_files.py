"""A checkpoint folder's other files, which go along or stay, and the stamps that tell whether any file changed."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from plans.errors import CheckpointError, IncompleteError, MismatchError
from plans.text import format_names
from runtime.checkpoint.files.file_names import MANIFEST, MARKER
from runtime.checkpoint.files.reading import convert_read_errors

__all__ = [
    "WEIGHT_SUFFIXES",
    "SideFiles",
    "Stamp",
    "check_contained",
    "check_unchanged",
    "find_side_files",
    "read_stamp",
    "read_stamps",
    "walk_files",
]


WEIGHT_SUFFIXES = frozenset(
    (".bin", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".pt", ".pth", ".pkl", ".pickle", ".safetensors")
)
"""The suffixes of weight files in any format."""


@dataclass(frozen=True)
class SideFiles:
    """The names of files relative to the checkpoint's folder, with `/` between their parts.

    Args:
        copied: regular files that are copied unchanged.
        left_behind: weights that are not the checkpoint's, hidden folders, and anything that is not a regular file.
    """

    copied: tuple[str, ...] = ()
    left_behind: tuple[str, ...] = ()


def find_side_files(folder: Path, used: Collection[str]) -> SideFiles:
    """Find a folder's side files, those of its subfolders included.

    Args:
        folder: the checkpoint's folder.
        used: the names of its weight files and index, which are not side files.

    Raises:
        IncompleteError: a link is broken.
        CheckpointError: a link leads out of the folder.
    """
    copied: list[str] = []
    left_behind: list[str] = []
    for path in walk_files(folder):
        name = path.relative_to(folder).as_posix()
        if name not in used:
            (copied if _is_copied(folder, path) else left_behind).append(name)
    return SideFiles(tuple(copied), tuple(left_behind))


def check_contained(folder: Path, path: Path) -> None:
    """Refuse a link that leads to anywhere but the folder itself or the hub cache's blobs beside it.

    Raises:
        IncompleteError: the link is broken.
        CheckpointError: the link leads out of the folder.
    """
    root, target = folder.resolve(), Path(os.path.realpath(path))
    if not target.exists():
        raise IncompleteError(f"{path}: a broken link", hint="restore its target, or remove it", file=str(path))
    is_blob = root.parent.name == "snapshots" and target.parent == root.parent.parent / "blobs"
    if not (is_blob or target.is_relative_to(root)):
        raise CheckpointError(
            f"{path}: a link that leads out of the checkpoint",
            hint="replace the link with the file, or remove it",
            file=str(path),
        )


def walk_files(folder: Path) -> Iterator[Path]:
    """Yield files, links and hidden folders in the order of their names, without following links to folders."""
    waiting = sorted(folder.iterdir(), reverse=True)
    while waiting:
        path = waiting.pop()
        if path.is_dir() and not path.is_symlink() and not path.name.startswith("."):
            waiting += sorted(path.iterdir(), reverse=True)
        else:
            yield path


def _is_copied(folder: Path, path: Path) -> bool:
    if path.is_symlink():
        check_contained(folder, path)
    is_weights = path.suffix in WEIGHT_SUFFIXES or path.name.endswith(".index.json")
    return path.is_file() and not is_weights and not _is_migrator_file(path.name)


def _is_migrator_file(name: str) -> bool:
    """Return whether a file is our manifest, or the journal of a rank."""
    return name == MANIFEST or name.startswith(MARKER)


@dataclass(frozen=True, slots=True)
class Stamp:
    """What changes when a file is written or replaced: its size in bytes, its time in nanoseconds, its inode."""

    size: int
    mtime_ns: int
    inode: int


def read_stamps(folder: Path) -> dict[str, Stamp]:
    """Return the stamps of a folder's files by name, taken before any of them is read.

    Raises:
        CheckpointError: the folder cannot be listed.
    """
    with convert_read_errors(folder):
        paths = [path for path in walk_files(folder) if path.is_file()] if folder.is_dir() else []
    stamps = {path.relative_to(folder).as_posix(): read_stamp(path) for path in paths}
    return {name: stamp for name, stamp in stamps.items() if stamp is not None}


def check_unchanged(folder: Path, stamps: Mapping[str, Stamp], ignored: Collection[str]) -> None:
    """Refuse to continue if one of a folder's files is no longer the one that was read.

    Args:
        folder: the source's folder.
        stamps: the stamps of its files, taken before they were read.
        ignored: the names of files that were not read.

    Raises:
        MismatchError: a file was changed, replaced or removed.
    """
    changed = [name for name in stamps.keys() - set(ignored) if read_stamp(folder / name) != stamps[name]]
    if changed:
        raise MismatchError(
            f"{folder}: {format_names(sorted(changed))} changed while it was read",
            hint="wait until nothing writes to this folder, then run the same command again",
            files=sorted(changed),
        )


def read_stamp(path: Path) -> Stamp | None:
    """Return the stamp of a file, or None if it does not exist."""
    try:
        status = path.stat()
    except OSError:  # a file that is gone has changed too
        return None
    return Stamp(status.st_size, status.st_mtime_ns, status.st_ino)
