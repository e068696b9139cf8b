"""Committing a folder: all work happens beside the destination, and one rename makes it appear whole."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from plans.errors import DestinationError
from runtime.checkpoint.lock import locked
from runtime.checkpoint.record import MANIFEST

__all__ = ["MARKER", "check_destination", "staging", "sync"]

MARKER = ".migrator-partial"


@contextmanager
def staging(destination: Path, size: int) -> Iterator[Path]:
    """Give a folder to work in that becomes `destination` if the body ends well and vanishes if it does not.

    One process at a time works on a destination: it holds the lock of `DST.partial.lock`, which dies with it.

    Args:
        destination: must not exist; its parent must.
        size: bytes that the body will write.

    Raises:
        DestinationError: the destination exists, another run works on it, what lies at `DST.partial` is not ours,
            or the disk cannot hold the result.
    """
    destination = destination.absolute()
    check_destination(destination)
    _check_space(destination, size)
    partial = destination.with_name(destination.name + ".partial")
    try:
        with locked(partial.with_name(partial.name + ".lock")):
            # Only now: the run that held the lock before may have committed since.
            _check_absent(destination)
            _start(partial)
            try:
                yield partial
                (partial / MARKER).unlink()
                sync(partial)
                _check_absent(destination)
                partial.rename(destination)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
            sync(destination.parent)
    except OSError as error:
        raise _unwritable(destination, error) from error


def check_destination(destination: Path) -> None:
    """Refuse a destination that could not be committed, before any work is done for it.

    Raises:
        DestinationError: it exists, or its parent does not.
    """
    _check_absent(destination)
    if not destination.absolute().parent.is_dir():
        raise DestinationError(f"{destination.parent}: not a folder", hint="create it first")


def sync(path: Path) -> None:
    """Bring a file or a folder's list of names to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_space(destination: Path, size: int) -> None:
    free = shutil.disk_usage(destination.parent).free
    if free < size:
        raise DestinationError(
            f"{destination}: needs {size} bytes but the disk has {free} free",
            hint="free some space or choose another disk",
            needed=size,
            free=free,
        )


def _check_absent(destination: Path) -> None:
    if os.path.lexists(destination):
        raise DestinationError(
            f"{destination}: exists already", hint="name a new folder or remove this one", path=str(destination)
        )


def _start(partial: Path) -> None:
    """Create the working folder in place of what a killed run left; refuse what is not ours."""
    if os.path.lexists(partial):
        if not _is_leftover(partial):
            raise DestinationError(
                f"{partial}: is in the way and was not left by migrator", hint="move it away", path=str(partial)
            )
        shutil.rmtree(partial)
    partial.mkdir()
    (partial / MARKER).touch(exist_ok=False)


def _is_leftover(partial: Path) -> bool:
    """Return whether a killed run left this: marked, complete but for the rename, or not yet marked."""
    if partial.is_symlink() or not partial.is_dir():
        return False
    return (partial / MARKER).is_file() or (partial / MANIFEST).is_file() or not any(partial.iterdir())


def _unwritable(destination: Path, error: OSError) -> DestinationError:
    hint = "free some space or choose another disk" if error.errno == errno.ENOSPC else "check the path and its rights"
    return DestinationError(f"{destination}: {error.strerror or error}", hint=hint, errno=error.errno)
