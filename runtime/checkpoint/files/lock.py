"""A lock beside what it guards: held by an open file, so it dies with its process, and removed without a race."""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from plans.errors import DestinationError

__all__ = ["check_unlocked", "hold_lock", "hold_temporary_lock"]


@contextmanager
def hold_temporary_lock(path: Path) -> Iterator[None]:
    """Hold the lock of a file that is there only as long as somebody holds it, or was killed holding it.

    Args:
        path: of the file; created when it is missing.

    Raises:
        DestinationError: another process holds the lock, or something else is at the path.
    """
    descriptor = _acquire(path)
    try:
        yield
    finally:
        # Removed while it is locked, so nobody can hold the lock of the file that goes.
        path.unlink(missing_ok=True)
        os.close(descriptor)


@contextmanager
def hold_lock(path: Path) -> Iterator[None]:
    """Hold the lock of a file that stays; it is created when it is missing.

    Raises:
        DestinationError: another process holds it.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    try:
        _lock(descriptor, path)
        yield
    finally:
        os.close(descriptor)


def check_unlocked(path: Path) -> None:
    """Refuse to go on where another process holds the lock of a file."""
    with hold_lock(path):
        pass


def _acquire(path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        try:
            _check_lock_file(descriptor, path)
            _lock(descriptor, path)
            if _is_at(descriptor, path):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        # The holder before us removed the file between our opening and our locking it.
        os.close(descriptor)


def _lock(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise DestinationError(
            f"{_get_guarded_path(path)}: another run is writing it", hint="wait for that run to end", path=str(path)
        ) from error


def _check_lock_file(descriptor: int, path: Path) -> None:
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_size:
        raise DestinationError(
            f"{path}: is in the way and was not left by migrator", hint="move it away", path=str(path)
        )


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False


def _get_guarded_path(path: Path) -> Path:
    """Return what a lock is for: the folder beside it, or the one that it is in."""
    return path.with_suffix("") if path.suffix == ".lock" else path.parent
