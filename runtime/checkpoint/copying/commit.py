"""Committing a folder: all work happens beside the destination, and one rename makes it appear whole."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from plans.errors import CheckpointError, DestinationError, MigratorError, MismatchError
from runtime.checkpoint.copying.journal import begin_journal, read_journal
from runtime.checkpoint.files.file_names import MARKER
from runtime.checkpoint.files.lock import check_unlocked, hold_temporary_lock
from runtime.checkpoint.files.replaceable import check_replaceable

__all__ = ["Say", "check_destination", "convert_write_errors", "partial_folder", "stage_folder", "sync"]

Say = Callable[[str], None]
"""Tells a person what is good to know."""

_RESUMES = "then run the same command again: it goes on where this one stopped"


@contextmanager
def stage_folder(
    destination: Path,
    size: int,
    *,
    fingerprint: str = "",
    overwrite: bool = False,
    names: Collection[str] = (),
    say: Say = lambda text: None,
) -> Iterator[Path]:
    """Give a folder to work in that becomes `destination` if the body ends well.

    If the body fails, the folder stays for the next run as soon as its journal says that something in it is safe;
    a source whose content is found to be wrong is nothing to go on with. One process at a time works on a destination:
    it holds the lock of `DST.partial.lock`, which dies with it.

    Args:
        destination: must not exist unless it may be replaced; its parent must.
        size: bytes that the result takes.
        fingerprint: the fingerprint of the work; only a run with the same one goes on with what another left.
        overwrite: replace the checkpoint that is at the destination, if it holds nothing else.
        names: of the result's files, which may replace others of their names.
        say: told what became of an earlier run's work.

    Raises:
        DestinationError: the destination exists, another run works on it, what lies at `DST.partial` is not ours,
            or the disk cannot hold the result.
    """
    destination = destination.absolute()
    check_destination(destination, overwrite=overwrite, names=names)
    partial, aside = partial_folder(destination), destination.with_name(destination.name + ".replaced")
    with convert_write_errors(destination), hold_temporary_lock(partial.with_name(partial.name + ".lock")):
        _restore_replaced(destination, aside)
        # Only now: the run that held the lock before may have committed since.
        check_destination(destination, overwrite=overwrite, names=names)
        _check_space(destination, size - _count_allocated_bytes(partial))
        _create_or_resume(partial, fingerprint, say)
        with _keep_if_resumable(partial, destination):
            yield partial
            sync(partial)
            check_destination(destination, overwrite=overwrite, names=names)
            _replace(partial, destination, aside)
        (destination / MARKER).unlink()
        sync(destination)
        if os.path.lexists(aside):
            _discard(aside)


def check_destination(destination: Path, *, overwrite: bool = False, names: Collection[str] | None = None) -> None:
    """Refuse a destination that could not be committed, before any work is done for it.

    Args:
        destination: must not exist unless it may be replaced; its parent must.
        overwrite: replace the checkpoint that is at the destination.
        names: of the result's files, None where they are not known yet.

    Raises:
        DestinationError: it exists and may not be replaced, or its parent does not exist.
    """
    if os.path.lexists(destination):
        if not overwrite:
            raise DestinationError(
                f"{destination}: exists already",
                hint="name a new folder, remove this one, or replace it with `overwrite`",
                path=str(destination),
            )
        check_replaceable(destination, names)
    if not destination.absolute().parent.is_dir():
        raise DestinationError(
            f"{destination.parent}: not a folder", hint="create it first", path=str(destination.parent)
        )


def partial_folder(destination: Path) -> Path:
    """Return the folder that is worked in before it becomes the destination."""
    destination = destination.absolute()
    return destination.with_name(destination.name + ".partial")


@contextmanager
def convert_write_errors(destination: Path) -> Iterator[None]:
    """Turn what the system says when a destination cannot be written into an error for the user.

    Raises:
        DestinationError: the body's writing failed.
    """
    try:
        yield
    except OSError as error:
        raise _write_error(destination, error) from error


def sync(path: Path) -> None:
    """Bring a file or a folder's list of names to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _keep_if_resumable(partial: Path, destination: Path) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        is_worth_it = _has_progress(partial) and not isinstance(error, MismatchError)
        if not is_worth_it and partial.is_dir():
            _discard(partial)
        if isinstance(error, OSError):
            raise _write_error(destination, error, resumes=is_worth_it) from error
        if isinstance(error, CheckpointError) and is_worth_it:
            _add_hint(error)
        raise


def _has_progress(partial: Path) -> bool:
    """Return whether a journal, of this process or of one that shares the work, says that something is safe."""
    return (partial / MARKER).is_file() and any(read_journal(path).units for path in partial.glob(f"{MARKER}*"))


def _check_space(destination: Path, size: int) -> None:
    free = shutil.disk_usage(destination.parent).free
    if free < size:
        raise DestinationError(
            f"{destination}: needs {size} bytes but the disk has {free} free",
            hint="free some space or choose another disk",
            needed=size,
            free=free,
        )


def _count_allocated_bytes(partial: Path) -> int:
    """Return the bytes of the disk that an earlier run's folder takes already."""
    if partial.is_symlink() or not partial.is_dir():
        return 0
    return sum(path.lstat().st_blocks * 512 for path in partial.rglob("*"))


def _create_or_resume(partial: Path, fingerprint: str, say: Say) -> None:
    """Create the working folder, or take up what a killed run left; refuse what is not ours."""
    if os.path.lexists(partial):
        if not _is_leftover(partial):
            raise DestinationError(
                f"{partial}: is in the way and was not left by migrator", hint="move it away", path=str(partial)
            )
        for path in partial.glob(f"{MARKER}*"):
            check_unlocked(path)  # a rank of an earlier run may be at work yet
        if _has_progress(partial):
            if read_journal(partial / MARKER).fingerprint == fingerprint:
                return
            say(f"note: {partial} was left by a run with another source or target, and is written anew")
        _discard(partial)
    partial.mkdir()
    begin_journal(partial / MARKER, fingerprint)
    sync(partial)


def _is_leftover(partial: Path) -> bool:
    """Return whether a killed run left this: marked, or not yet marked."""
    if partial.is_symlink() or not partial.is_dir():
        return False
    marker = partial / MARKER
    return (marker.is_file() and not marker.is_symlink()) or not any(partial.iterdir())


def _replace(partial: Path, destination: Path, aside: Path) -> None:
    """Put the new folder in the place of the old one, which a run killed in between can put back."""
    if os.path.lexists(destination):
        (destination / MARKER).touch()
        destination.rename(aside)
    partial.rename(destination)
    sync(destination.parent)


def _restore_replaced(destination: Path, aside: Path) -> None:
    """Undo or finish what a run killed while replacing left."""
    if not os.path.lexists(aside):
        return
    if aside.is_symlink() or not (aside / MARKER).is_file():
        raise DestinationError(
            f"{aside}: is in the way and was not left by migrator", hint="move it away", path=str(aside)
        )
    if os.path.lexists(destination):
        _discard(aside)
    else:
        aside.rename(destination)
        (destination / MARKER).unlink()


def _discard(folder: Path) -> None:
    """Remove a folder of ours, its mark last: killed in between, it is still known for what it is."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != MARKER:
            path.unlink()
    (folder / MARKER).unlink(missing_ok=True)
    folder.rmdir()


def _write_error(destination: Path, error: OSError, *, resumes: bool = False) -> DestinationError:
    hint = "free some space or choose another disk" if error.errno == errno.ENOSPC else "check the path and its rights"
    hint = f"{hint}, {_RESUMES}" if resumes else hint
    return DestinationError(f"{destination}: {error.strerror or error}", hint=hint, errno=error.errno)


def _add_hint(error: MigratorError) -> None:
    if "again" not in error.hint:
        error.hint = f"{error.hint}, {_RESUMES}"
