"""Commit a folder: all work happens beside the destination, and one rename makes it appear whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from plans.errors import CheckpointError, DestinationError, MismatchError
from runtime.checkpoint.copying.journal import begin_journal, read_journal
from runtime.checkpoint.files.file_names import MARKER, check_replaceable
from runtime.checkpoint.files.lock import check_unlocked, hold_temporary_lock
from runtime.checkpoint.files.reading import convert_read_errors
from runtime.checkpoint.files.system import READ_ONLY, advise_on_write

__all__ = [
    "Say",
    "check_destination",
    "check_not_nested",
    "convert_write_errors",
    "copy_files",
    "partial_folder",
    "stage_folder",
    "sync",
    "write_file",
]

Say = Callable[[str], None]
"""Called with a line of text for the user."""

_PART = 2**20
_RESUMES = "then run the same command again: it continues where this one stopped"


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
    """Give a folder to work in, which becomes `destination` when the body ends without an error.

    If the body fails, the folder stays for the next run, provided that its journal records some work and the source's
    content was not found to be wrong. Only one process at a time works on a destination: it holds the lock of
    `DST.partial.lock`, which dies with it.

    Args:
        destination: the folder to create, which must not exist unless it may be replaced; its parent must exist.
        size: the bytes that the result takes.
        fingerprint: the fingerprint of the work; a run continues only work with the same fingerprint.
        overwrite: whether to replace a checkpoint at the destination, if the folder contains nothing else.
        names: the names of the result's files, which may replace files of the same name.
        say: called with a line of text about what happened to an earlier run's work.

    Raises:
        DestinationError: the destination exists, another run is writing it, something at `DST.partial` was not left
            by migrator, or the disk cannot hold the result.
        UsageError: the system has no file locks.
    """
    destination = destination.absolute()
    check_destination(destination, overwrite=overwrite, names=names)
    partial, aside = partial_folder(destination), destination.with_name(destination.name + ".replaced")
    with convert_write_errors(destination), hold_temporary_lock(partial.with_name(partial.name + ".lock")):
        _restore_replaced(destination, aside)
        # Checked again under the lock: the run that held it before may have committed since.
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
        destination: the folder to create, which must not exist unless it may be replaced; its parent must exist.
        overwrite: whether to replace a checkpoint at the destination.
        names: the names of the result's files, or None if they are not known yet.

    Raises:
        DestinationError: the destination exists and may not be replaced, or its parent does not exist.
    """
    if os.path.lexists(destination):
        if not overwrite:
            raise DestinationError(
                f"{destination}: already exists",
                hint="name a new folder, or replace this one with `overwrite`",
                path=str(destination),
            )
        check_replaceable(destination, names)
    if not destination.absolute().parent.is_dir():
        raise DestinationError(
            f"{destination.parent}: not a folder", hint="create it first", path=str(destination.parent)
        )


def check_not_nested(source: Path, destination: Path) -> None:
    """Refuse to replace the source or a folder that contains it, and to write into the source.

    Raises:
        DestinationError: the destination is such a folder.
    """
    source_path, destination_path = source.resolve(), destination.resolve()
    if source_path == destination_path:
        problem = "is the source itself, which stays as it is"
    elif source_path.is_relative_to(destination_path):
        problem = "contains the source"
    elif destination_path.is_relative_to(source_path):
        problem = "lies in the source"
    else:
        return
    raise DestinationError(f"{destination}: {problem}", hint="name another folder", path=str(destination))


def partial_folder(destination: Path) -> Path:
    """Return the folder in which a destination is prepared."""
    destination = destination.absolute()
    return destination.with_name(destination.name + ".partial")


@contextmanager
def convert_write_errors(destination: Path) -> Iterator[None]:
    """Convert the OSError of a destination that cannot be written into an error for the user.

    Raises:
        DestinationError: the body failed to write.
    """
    try:
        yield
    except OSError as error:
        raise _write_error(destination, error) from error


def sync(path: Path) -> None:
    """Sync a file, or a folder's list of names, to the disk."""
    descriptor = os.open(path, READ_ONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def copy_files(source: Path, names: Iterable[str], target: Path) -> None:
    """Copy files over what an earlier run left, and sync them and their folders.

    Args:
        source: the folder of the files.
        names: the names of files in it or in its subfolders.
        target: the folder to copy to.

    Raises:
        CheckpointError: a source file cannot be read.
    """
    folders: set[Path] = set()
    for name in names:
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        folders |= {target / part for part in Path(name).parents}
        with path.open("wb") as stream:
            stream.writelines(_read_parts(source / name))
        sync(path)
    for folder in folders:
        sync(folder)


def write_file(path: Path, content: bytes) -> None:
    """Write a file over whatever an earlier run left, and sync it."""
    with path.open("wb") as stream:
        stream.write(content)
    sync(path)


@contextmanager
def _keep_if_resumable(partial: Path, destination: Path) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        is_resumable = _has_progress(partial) and not isinstance(error, MismatchError)
        if not is_resumable and partial.is_dir():
            _discard(partial)
        if isinstance(error, OSError):
            raise _write_error(destination, error, resumes=is_resumable) from error
        if isinstance(error, CheckpointError) and is_resumable and "again" not in error.hint:
            error.hint = f"{error.hint}, {_RESUMES}"
        raise


def _has_progress(partial: Path) -> bool:
    """Return whether a journal, of this process or of another rank, records any work."""
    return (partial / MARKER).is_file() and any(read_journal(path).units for path in partial.glob(f"{MARKER}*"))


def _check_space(destination: Path, size: int) -> None:
    free = shutil.disk_usage(destination.parent).free
    if free < size:
        raise DestinationError(
            f"{destination}: needs {size} bytes, but the disk has {free} free",
            hint="free some space or choose another disk",
            needed=size,
            free=free,
        )


def _count_allocated_bytes(partial: Path) -> int:
    """Return the disk space that an earlier run's folder takes already."""
    if partial.is_symlink() or not partial.is_dir():
        return 0
    return sum(path.lstat().st_blocks * 512 for path in partial.rglob("*"))


def _create_or_resume(partial: Path, fingerprint: str, say: Say) -> None:
    """Create the working folder, or resume the one that a killed run left; refuse any other folder."""
    if os.path.lexists(partial):
        if not _is_leftover(partial):
            raise DestinationError(
                f"{partial}: is in the way and was not left by migrator", hint="move it away", path=str(partial)
            )
        for path in partial.glob(f"{MARKER}*"):
            check_unlocked(path)  # a rank of an earlier run may still be working
        if _has_progress(partial):
            if read_journal(partial / MARKER).fingerprint == fingerprint:
                return
            say(f"note: {partial} was left by a run with another source or target; starting over")
        _discard(partial)
    partial.mkdir()
    begin_journal(partial / MARKER, fingerprint)
    sync(partial)


def _is_leftover(partial: Path) -> bool:
    """Return whether a killed run left this folder, with a journal or still empty."""
    if partial.is_symlink() or not partial.is_dir():
        return False
    marker = partial / MARKER
    return (marker.is_file() and not marker.is_symlink()) or not any(partial.iterdir())


def _replace(partial: Path, destination: Path, aside: Path) -> None:
    """Move the new folder to the place of the old one, which is kept aside so that the next run can restore it."""
    if os.path.lexists(destination):
        (destination / MARKER).touch()
        destination.rename(aside)
    partial.rename(destination)
    sync(destination.parent)


def _restore_replaced(destination: Path, aside: Path) -> None:
    """Undo or finish what a run that was killed while replacing left."""
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
    """Remove a folder of ours, its journal last, so that it is still recognized if we are killed in between."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != MARKER:
            path.unlink()
    (folder / MARKER).unlink(missing_ok=True)
    folder.rmdir()


def _write_error(destination: Path, error: OSError, *, resumes: bool = False) -> DestinationError:
    hint = advise_on_write(error)
    hint = f"{hint}, {_RESUMES}" if resumes else hint
    return DestinationError(f"{destination}: {error.strerror or error}", hint=hint, errno=error.errno)


def _read_parts(path: Path) -> Iterator[bytes]:
    """Yield a file's content in parts; a failure to read is not reported as a failure to write."""
    with convert_read_errors(path), path.open("rb") as stream:
        while part := stream.read(_PART):
            yield part
