"""Changes written: an owner and its copies together or not at all, each file in one step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from codemods.files.sources import format_path
from codemods.rewriting.replace_source import check_replaceable, replace_source
from codemods.tree.outcome import Change
from plans.errors import MigratorError, SourceError

__all__ = ["WriteResult", "write_changes"]

_WRITERS = 8


@dataclass(frozen=True)
class WriteResult:
    """What became of the changes.

    Args:
        changes: those that were written.
        errors: why the others were not.
    """

    changes: tuple[Change, ...]
    errors: tuple[MigratorError, ...]


def write_changes(changes: Sequence[Change]) -> WriteResult:
    """Write every file, owners before copies; an owner and its copies are written together or not at all.

    Where one of them cannot be written, nothing that belongs to its owners is, and everything else still is.
    """
    if not changes:
        return WriteResult((), ())
    from concurrent.futures import ThreadPoolExecutor

    errors = {change.path: error for change in changes if (error := _capture_error(check_replaceable, change.source))}
    stopped = {owner for change in changes if change.path in errors for owner in change.owners}
    wanted = [change for change in changes if not stopped & change.owners]
    held_back = [
        _build_blocked_error(change) for change in changes if change not in wanted and change.path not in errors
    ]
    # Each write waits for the disk: side by side they wait together.
    with ThreadPoolExecutor(_WRITERS) as writers:
        for role in ("owner", "copy"):
            batch = [change for change in wanted if change.role == role and not stopped & change.owners]
            results = writers.map(lambda change: _capture_error(replace_source, change.source, change.data), batch)
            failed = {change.path: error for change, error in zip(batch, results, strict=True) if error}
            errors |= failed
            stopped |= {owner for change in batch if change.path in failed for owner in change.owners}
    written = tuple(change for change in wanted if change.path not in errors and not stopped & change.owners)
    return WriteResult(written, (*errors.values(), *held_back))


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
