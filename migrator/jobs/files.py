"""A job's own files: only regular files are read, files are written atomically, and stamps detect changes."""

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
"""A file's size in bytes, modification and change time in nanoseconds, and inode."""
Stamps = Mapping[str, Stamp]
"""Stamps of files by path; a stamp changes whenever its file is written or replaced."""

_OPEN_FLAGS = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
"""Where the system can: links are not followed, and opening a named pipe does not block."""


def collect_stamps(files: Iterable[Path]) -> Stamps:
    """Return the stamps of the files that exist."""
    stamps: dict[str, Stamp] = {}
    for file in files:
        with suppress(OSError):  # A missing file has no stamp, which shows that it is gone.
            status = file.stat()
            stamps[str(file)] = (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
    return stamps


def list_files(path: Path) -> Iterator[Path]:
    """Yield the files of a folder and its subfolders, or the path itself if it is not a folder."""
    if not path.is_dir():
        yield path
    for folder, folders, names in os.walk(path):
        folders.sort()
        yield from (Path(folder, name) for name in sorted(names))


def is_regular_file(path: Path) -> bool:
    """Return whether a path is a regular file, and not a link to one."""
    return stat.S_ISREG(path.lstat().st_mode) if os.path.lexists(path) else False


def read_regular_file(path: Path, limit: int, *, follow_links: bool = False) -> bytes:
    """Return the content of a regular file.

    Args:
        path: the file.
        limit: the maximum size in bytes.
        follow_links: whether the path may be a link.

    Raises:
        OSError: it cannot be read, is not a regular file, or is larger than `limit`.
    """
    descriptor = os.open(path, os.O_RDONLY | (_OPEN_FLAGS & ~os.O_NOFOLLOW if follow_links else _OPEN_FLAGS))
    with open(descriptor, "rb") as stream:  # noqa: PTH123 - a descriptor, not a path
        _check_regular_file(descriptor)
        content = stream.read(limit + 1)
    if len(content) > limit:
        raise OSError(0, f"is larger than {limit:,} bytes")
    return content


def open_events(path: Path) -> TextIO:
    """Open a file of lines for appending; an incomplete last line, left by a kill, is ended first.

    Raises:
        OSError: it cannot be written, or is not a regular file.
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
        raise OSError(0, "is not a regular file")


def remove_file(file: Path) -> None:
    """Remove a file if it exists.

    Raises:
        DestinationError: it cannot be removed.
    """
    with raise_destination_errors(file):
        file.unlink(missing_ok=True)


def format_json(value: object) -> str:
    """Return a value as indented JSON text."""
    return json.dumps(value, indent=2, default=str) + "\n"


def write_atomically(file: Path, content: bytes) -> None:
    """Write a file atomically, and create its folder if needed; a kill leaves the old file or the new one.

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
    """Raise an `OSError` of the body as an error for the user.

    Raises:
        DestinationError: the body could not write.
    """
    try:
        yield
    except OSError as error:
        raise DestinationError(
            f"{path}: {error.strerror or error}", hint="set `output` to a folder that can be written", path=str(path)
        ) from error
