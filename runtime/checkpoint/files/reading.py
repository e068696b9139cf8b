"""Read files: a failure of the system becomes an error for the user, and a short read is continued."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from plans.errors import CheckpointError, IncompleteError
from runtime.checkpoint.files.system import READ_ONLY, read_at

__all__ = ["convert_read_errors", "open_descriptor", "open_regular", "read_at_most", "read_exactly", "truncation_error"]


@contextmanager
def convert_read_errors(path: Path) -> Iterator[None]:
    """Convert the OSError of a file that cannot be read into an error for the user.

    Raises:
        CheckpointError: opening, reading or listing failed.
    """
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read: {error.strerror or error}",
            hint="check that the disk is well and that you may read it",
            file=str(path),
            errno=error.errno,
        ) from error


@contextmanager
def open_descriptor(path: Path) -> Iterator[int]:
    """Open a file that is read by offsets, and give its descriptor; the body's own errors pass unchanged.

    Raises:
        CheckpointError: the file cannot be opened.
    """
    with convert_read_errors(path):
        descriptor = os.open(path, READ_ONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def open_regular(path: Path) -> Iterator[BinaryIO]:
    """Open a regular file, or the target of a link to one; pipes and devices are neither opened nor waited for.

    Raises:
        CheckpointError: the path is something else, or opening or reading it failed.
    """
    with convert_read_errors(path):
        if not stat.S_ISREG(path.stat().st_mode):
            raise CheckpointError(
                f"{path}: not a regular file",
                hint="name a file; folders, pipes and devices cannot be read",
                file=str(path),
            )
        # A pipe that took its place since then must not block either.
        with os.fdopen(os.open(path, READ_ONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as stream:
            yield stream


def read_at_most(path: Path, size: int) -> bytes:
    """Return the content of a small regular file.

    Args:
        path: the file.
        size: the number of bytes that it may have.

    Raises:
        CheckpointError: the file has more bytes, is not a regular file, or cannot be read.
    """
    with open_regular(path) as stream:
        content = stream.read(size + 1)
    if len(content) > size:
        raise CheckpointError(
            f"{path}: over {size:,} bytes, more than any such file has", hint="name another file", file=str(path)
        )
    return content


def read_exactly(descriptor: int, buffer: memoryview, offset: int, file: Path) -> None:
    """Fill a buffer from a file at an offset, however many reads it takes.

    Args:
        descriptor: the open file.
        buffer: what to fill.
        offset: the offset of its first byte in the file.
        file: the file's path, for error messages.

    Raises:
        IncompleteError: the file ends before the buffer is full.
        CheckpointError: the disk fails.
    """
    done = 0
    while done < len(buffer):
        with convert_read_errors(file):
            count = read_at(descriptor, buffer[done:], offset + done)
        if not count:
            raise truncation_error(file, offset + done, offset + len(buffer))
        done += count


def truncation_error(file: Path, size: int, expected: int) -> IncompleteError:
    """Return the error for a file that ends too early.

    Args:
        file: the file.
        size: the number of bytes it has.
        expected: the number of bytes it must have at least.
    """
    return IncompleteError(
        f"{file}: truncated, it has {size} bytes of at least {expected}",
        hint="download or save the file again",
        file=str(file),
        size=size,
        expected=expected,
    )
