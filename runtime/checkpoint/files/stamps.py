"""Stamps of a source's files, by which a run notices before it commits that a file changed while it was read."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from plans.errors import MismatchError
from plans.text import format_names
from runtime.checkpoint.files.reading import convert_read_errors
from runtime.checkpoint.files.side_files import walk_files

__all__ = ["Stamp", "check_unchanged", "read_stamp", "read_stamps"]


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
