"""Reading files: whatever the system says becomes an error for the user, and a short read is not the end."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from plans.errors import CheckpointError, IncompleteError

__all__ = ["read_exactly", "reading", "truncated"]


@contextmanager
def reading(path: Path) -> Iterator[None]:
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


def read_exactly(descriptor: int, buffer: memoryview, offset: int, file: Path) -> None:
    """Fill the buffer from the file at `offset`, however many reads it takes.

    Raises:
        IncompleteError: the file ends first.
        CheckpointError: the disk fails.
    """
    done = 0
    while done < len(buffer):
        with reading(file):
            count = os.preadv(descriptor, [buffer[done:]], offset + done)
        if not count:
            raise truncated(file, offset + done, offset + len(buffer))
        done += count


def truncated(file: Path, size: int, expected: int) -> IncompleteError:
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
