"""Writing of changes: an owner and its copies together or not at all, each file atomically."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from codemods.files.sources import SourceFile, format_path, read_source
from codemods.tree.outcome import Change
from plans.errors import MigratorError, SourceError

__all__ = ["WriteResult", "check_replaceable", "replace_source", "write_changes"]


def check_replaceable(source: SourceFile) -> None:
    """Check that a file can be replaced and has not changed since it was read.

    Raises:
        SourceError: the file changed, or it or its folder is read-only.
    """
    try:
        if read_source(source.path).data != source.data:
            raise SourceError(
                f"{format_path(source.path)}: changed by someone else since it was read",
                hint="run again",
                path=str(source.path),
            )
        target = source.path.resolve()
        if not (os.access(target, os.W_OK) and os.access(target.parent, os.W_OK)):
            raise PermissionError(0, "is read-only")
    except OSError as error:
        raise _build_write_error(source, error) from error


def replace_source(source: SourceFile, data: bytes) -> None:
    """Replace a file's bytes atomically, keeping its mode: a killed process leaves the old file or the new one.

    Raises:
        SourceError: the file changed since it was read, or cannot be replaced.
    """
    check_replaceable(source)
    try:
        _replace_atomically(source.path.resolve(), data)
    except OSError as error:
        raise _build_write_error(source, error) from error


def _build_write_error(source: SourceFile, error: OSError) -> SourceError:
    return SourceError(
        f"{format_path(source.path)}: {error.strerror}", hint="make it writable or leave it out", path=str(source.path)
    )


def _replace_atomically(target: Path, data: bytes) -> None:
    import tempfile

    descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".migrator")
    temporary = Path(name)
    try:
        with open(descriptor, "wb") as file:  # noqa: PTH123 - a descriptor, not a path
            file.write(data)
            file.flush()
            temporary.chmod(stat.S_IMODE(target.stat().st_mode))
            os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException:
        with suppress(FileNotFoundError):
            temporary.unlink()
        raise


_WRITERS = 8


@dataclass(frozen=True)
class WriteResult:
    """The result of writing changes.

    Args:
        changes: the changes that were written.
        errors: the reasons why the others were not.
    """

    changes: tuple[Change, ...]
    errors: tuple[MigratorError, ...]


def write_changes(changes: Sequence[Change]) -> WriteResult:
    """Write every file, owners before copies, unless a file with edits of the same owners cannot be written.

    All files are checked before the first is written. If a write still fails, as on a full disk, no further file of the
    same owners is written; those that were are in the result, so that the next run can complete them.
    """
    if not changes:
        return WriteResult((), ())
    from concurrent.futures import ThreadPoolExecutor

    errors = {change.path: error for change in changes if (error := _capture_error(check_replaceable, change.source))}
    failed_owners = {owner for change in changes if change.path in errors for owner in change.owners}
    wanted = [change for change in changes if not failed_owners & change.owners]
    blocked = [_build_blocked_error(change) for change in changes if change not in wanted and change.path not in errors]
    written: set[Path] = set()
    # Each write waits for the disk; concurrent writes wait together.
    with ThreadPoolExecutor(_WRITERS) as writers:
        for role in ("owner", "copy"):
            batch = [change for change in wanted if change.role == role and not failed_owners & change.owners]
            results = writers.map(lambda change: _capture_error(replace_source, change.source, change.data), batch)
            failed = {change.path: error for change, error in zip(batch, results, strict=True) if error}
            errors |= failed
            written |= {change.path for change in batch if change.path not in failed}
            failed_owners |= {owner for change in batch if change.path in failed for owner in change.owners}
    blocked += [_build_blocked_error(change) for change in wanted if change.path not in written | errors.keys()]
    return WriteResult(tuple(change for change in wanted if change.path in written), (*errors.values(), *blocked))


def _capture_error(action: Callable[..., None], *arguments: object) -> MigratorError | None:
    try:
        action(*arguments)
    except MigratorError as error:
        return error
    return None


def _build_blocked_error(change: Change) -> MigratorError:
    return SourceError(
        f"{format_path(change.path)}: not written, because another file of the same plan cannot be",
        hint="make that file writable and run again",
        path=str(change.path),
    )
