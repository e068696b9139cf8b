"""Reading files: whatever the system says becomes an error for the user, and a short read is not the end."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from plans.errors import CheckpointError, IncompleteError

__all__ = ["convert_read_errors", "open_descriptor", "open_regular", "read_at_most", "read_exactly", "truncation_error"]


@contextmanager
def convert_read_errors(path: Path) -> Iterator[None]:
    """Turn what the system says when a file cannot be read into an error for the user.

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
    """Give the descriptor of a file that is read by offsets; what the body says is not taken for what opening says.

    Raises:
        CheckpointError: it cannot be opened.
    """
    with convert_read_errors(path):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def open_regular(path: Path) -> Iterator[BinaryIO]:
    """Open a regular file, or what a link to one leads to; pipes and devices are neither opened nor waited for.

    Raises:
        CheckpointError: it is anything else, or opening or reading failed.
    """
    with convert_read_errors(path):
        if not stat.S_ISREG(path.stat().st_mode):
            raise CheckpointError(
                f"{path}: not a regular file",
                hint="name a file; folders, pipes and devices are not read",
                file=str(path),
            )
        # Whatever took its place since then is not waited for either.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as stream:
            yield stream


def read_at_most(path: Path, size: int) -> bytes:
    """Return what a small regular file holds.

    Args:
        path: of the file.
        size: bytes that it may have.

    Raises:
        CheckpointError: it has more, is no regular file or cannot be read.
    """
    with open_regular(path) as stream:
        text = stream.read(size + 1)
    if len(text) > size:
        raise CheckpointError(
            f"{path}: over {size:,} bytes, more than any such file has", hint="name another file", file=str(path)
        )
    return text


def read_exactly(descriptor: int, buffer: memoryview, offset: int, file: Path) -> None:
    """Fill the buffer from the file at `offset`, however many reads it takes.

    Raises:
        IncompleteError: the file ends first.
        CheckpointError: the disk fails.
    """
    done = 0
    while done < len(buffer):
        with convert_read_errors(file):
            count = os.preadv(descriptor, [buffer[done:]], offset + done)
        if not count:
            raise truncation_error(file, offset + done, offset + len(buffer))
        done += count


def truncation_error(file: Path, size: int, expected: int) -> IncompleteError:
    """Return the error for a file that ends too early.

    Args:
        file: that ends.
        size: bytes that it has.
        expected: bytes that it must have at least.
    """
    return IncompleteError(
        f"{file}: truncated, it has {size} bytes of at least {expected}",
        hint="download or save the file again",
        file=str(file),
        size=size,
        expected=expected,
    )
