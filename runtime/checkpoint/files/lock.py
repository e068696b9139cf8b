"""Lock files: held through an open file, so that a lock dies with its process, and removed without a race."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from plans.errors import DestinationError
from runtime.checkpoint.files.system import READ_WRITE, check_has_locks, lock

__all__ = ["check_unlocked", "hold_lock", "hold_temporary_lock"]


@contextmanager
def hold_temporary_lock(path: Path) -> Iterator[None]:
    """Hold the lock of a file that exists only while a process holds it, or after one was killed holding it.

    Args:
        path: the lock file, created if it is missing.

    Raises:
        DestinationError: another process holds the lock, or the path is something else than a lock file.
        UsageError: the system has no file locks.
    """
    descriptor = _acquire(path)
    try:
        yield
    finally:
        # Removed while it is still locked, so that nobody can hold the lock of the removed file.
        path.unlink(missing_ok=True)
        os.close(descriptor)


@contextmanager
def hold_lock(path: Path) -> Iterator[None]:
    """Hold the lock of a file that stays; it is created if it is missing.

    Raises:
        DestinationError: another process holds the lock.
        UsageError: the system has no file locks.
    """
    descriptor = _open(path)
    try:
        _lock(descriptor, path)
        yield
    finally:
        os.close(descriptor)


def check_unlocked(path: Path) -> None:
    """Raise DestinationError if another process holds the lock of a file."""
    with hold_lock(path):
        pass


def _acquire(path: Path) -> int:
    while True:
        descriptor = _open(path)
        try:
            _check_lock_file(descriptor, path)
            _lock(descriptor, path)
            if _is_at(descriptor, path):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        # The previous holder removed the file after we opened it and before we locked it.
        os.close(descriptor)


def _open(path: Path) -> int:
    check_has_locks()
    return os.open(path, READ_WRITE | os.O_CREAT, 0o644)


def _lock(descriptor: int, path: Path) -> None:
    try:
        lock(descriptor)
    except BlockingIOError as error:
        raise DestinationError(
            f"{_get_guarded_path(path)}: another run is writing it", hint="wait for that run to end", path=str(path)
        ) from error


def _check_lock_file(descriptor: int, path: Path) -> None:
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_size:
        raise DestinationError(
            f"{path}: is in the way and was not left by migrator", hint="move it away", path=str(path)
        )


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False


def _get_guarded_path(path: Path) -> Path:
    """Return what a lock file guards: the folder beside it, or the folder that it is in."""
    return path.with_suffix("") if path.suffix == ".lock" else path.parent
