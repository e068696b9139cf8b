"""Stamps of a source's files: by them a run notices before it commits that one was changed while it was read."""

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
    """What changes whenever a file is written or replaced: its size in bytes, its time in nanoseconds, its inode."""

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
    found = {path.relative_to(folder).as_posix(): read_stamp(path) for path in paths}
    return {name: stamp for name, stamp in found.items() if stamp is not None}


def check_unchanged(folder: Path, stamps: Mapping[str, Stamp], ignored: Collection[str]) -> None:
    """Refuse to go on where one of a folder's files is no longer the one that was read.

    Args:
        folder: of the source.
        stamps: taken before it was read.
        ignored: names of files that were not.

    Raises:
        MismatchError: a file was changed, replaced or removed.
    """
    changed = [name for name in stamps.keys() - set(ignored) if read_stamp(folder / name) != stamps[name]]
    if changed:
        raise MismatchError(
            f"{folder}: {format_names(sorted(changed))} changed while it was read",
            hint="wait until nothing writes there any more, then run the same command again",
            files=sorted(changed),
        )


def read_stamp(path: Path) -> Stamp | None:
    """Return the stamp of one file, None where there is none."""
    try:
        found = path.stat()
    except OSError:  # It is gone, which is a change too.
        return None
    return Stamp(found.st_size, found.st_mtime_ns, found.st_ino)
