"""A job's own files: regular ones, in its own folders; each appears whole, and stamps tell whether one was touched."""

from __future__ import annotations

import json
import os
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from plans.errors import DestinationError

__all__ = [
    "Stamp",
    "Stamps",
    "collect_stamps",
    "format_json",
    "is_regular_file",
    "list_files",
    "open_events",
    "raise_destination_errors",
    "read_regular_file",
    "remove_file",
    "write_atomically",
]

Stamp = tuple[int, int, int, int]
"""Size in bytes, times of the last write and the last change in nanoseconds, and inode of a file."""
Stamps = Mapping[str, Stamp]
"""Stamps of files by path: they change whenever one is written or replaced."""

_OPEN_FLAGS = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
"""No link is followed, and no named pipe waited for."""


def collect_stamps(files: Iterable[Path]) -> Stamps:
    """Return the stamps of those files that are there."""
    found: dict[str, Stamp] = {}
    for file in files:
        with suppress(OSError):  # One that is gone has no stamp, and that is what tells.
            at = file.stat()
            found[str(file)] = (at.st_size, at.st_mtime_ns, at.st_ctime_ns, at.st_ino)
    return found


def list_files(path: Path) -> Iterator[Path]:
    """Yield the files of a folder and its subfolders, or the path itself where it is none."""
    if not path.is_dir():
        yield path
    for folder, folders, names in os.walk(path):
        folders.sort()
        yield from (Path(folder, name) for name in sorted(names))


def is_regular_file(path: Path) -> bool:
    """Return whether a regular file lies at a path, and no link to one."""
    return stat.S_ISREG(path.lstat().st_mode) if os.path.lexists(path) else False


def read_regular_file(path: Path, limit: int, *, follow_links: bool = False) -> bytes:
    """Return what a regular file holds.

    Args:
        path: of the file.
        limit: bytes that it may have.
        follow_links: whether it may be a link.

    Raises:
        OSError: it cannot be read, is no regular file, or is larger.
    """
    descriptor = os.open(path, os.O_RDONLY | (_OPEN_FLAGS & ~os.O_NOFOLLOW if follow_links else _OPEN_FLAGS))
    with open(descriptor, "rb") as stream:  # noqa: PTH123 - a descriptor, not a path
        _check_regular_file(descriptor)
        content = stream.read(limit + 1)
    if len(content) > limit:
        raise OSError(0, f"is larger than {limit:,} bytes")
    return content


def open_events(path: Path) -> TextIO:
    """Open a file of lines to add more; a last line that a kill tore is ended first.

    Raises:
        OSError: it cannot be written, or is no regular file.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | _OPEN_FLAGS, 0o644)
    try:
        _check_regular_file(descriptor)
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            os.write(descriptor, b"\n")
        return open(descriptor, "a", encoding="utf-8")  # noqa: PTH123 - a descriptor, not a path
    except BaseException:
        os.close(descriptor)
        raise


def _check_regular_file(descriptor: int) -> None:
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        raise OSError(0, "is no regular file")


def remove_file(file: Path) -> None:
    """Remove a file that may be there.

    Raises:
        DestinationError: it cannot be removed.
    """
    with raise_destination_errors(file):
        file.unlink(missing_ok=True)


def format_json(value: object) -> str:
    """Return a value as the JSON text of a file."""
    return json.dumps(value, indent=2, default=str) + "\n"


def write_atomically(file: Path, content: bytes) -> None:
    """Write a file in one step, its folder made where it is missing; a kill leaves the old one or the new one.

    Raises:
        DestinationError: it cannot be written.
    """
    with raise_destination_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.parent.is_symlink():
            raise OSError(0, f"{file.parent.name} is a link")
        descriptor, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
        try:
            with open(descriptor, "wb") as stream:  # noqa: PTH123 - a descriptor, not a path
                stream.write(content)
                stream.flush()
                os.fchmod(descriptor, 0o644)
                os.fsync(descriptor)
            Path(name).replace(file)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


@contextmanager
def raise_destination_errors(path: Path) -> Iterator[None]:
    """Turn what the system says when the body cannot write into an error for the user.

    Raises:
        DestinationError: it could not.
    """
    try:
        yield
    except OSError as error:
        raise DestinationError(
            f"{path}: {error.strerror or error}", hint="name an `output` that can be written", path=str(path)
        ) from error
