"""Committing a folder: all work happens beside the destination, and one rename makes it appear whole."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from plans.errors import DestinationError

__all__ = ["MARKER", "check_destination", "staging", "sync"]

MARKER = ".migrator-partial"
_MANIFEST = "migrator.json"


@contextmanager
def staging(destination: Path, size: int) -> Iterator[Path]:
    """Give a folder to work in that becomes `destination` if the body ends well and vanishes if it does not.

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
    with _owned(partial, destination) as marker:
        try:
            yield partial
            marker.unlink()
            sync(partial)
            _check_absent(destination)
            partial.rename(destination)
        except BaseException as error:
            shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, OSError):
                raise _unwritable(destination, error) from error
            raise
    sync(destination.parent)


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


@contextmanager
def _owned(partial: Path, destination: Path) -> Iterator[Path]:
    """Create the working folder and hold its marker's lock, which dies with the process."""
    try:
        _remove_leftover(partial)
        partial.mkdir()
        marker = partial / MARKER
        descriptor = os.open(marker, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise _unwritable(destination, error) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield marker
    finally:
        os.close(descriptor)


def _remove_leftover(partial: Path) -> None:
    """Remove what a killed run left; refuse what is not ours or still in use."""
    if not os.path.lexists(partial):
        return
    marker = partial / MARKER
    ours = not partial.is_symlink() and (marker.is_file() or (partial / _MANIFEST).is_file())
    if not ours:
        raise DestinationError(
            f"{partial}: is in the way and was not left by migrator", hint="move it away", path=str(partial)
        )
    if marker.is_file() and _is_locked(marker):
        raise DestinationError(
            f"{partial}: another run is writing it", hint="wait for that run to end", path=str(partial)
        )
    shutil.rmtree(partial)


def _is_locked(marker: Path) -> bool:
    with marker.open("rb") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _unwritable(destination: Path, error: OSError) -> DestinationError:
    hint = "free some space or choose another disk" if error.errno == errno.ENOSPC else "check the path and its rights"
    return DestinationError(f"{destination}: {error.strerror or error}", hint=hint, errno=error.errno)
