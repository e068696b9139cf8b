"""Source files replaced, each in one step, byte for byte outside what changed."""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from pathlib import Path

from codemods.files.sources import SourceFile, format_path, read_source
from plans.errors import SourceError

__all__ = ["check_replaceable", "replace_source"]


def check_replaceable(source: SourceFile) -> None:
    """Check that a file can be replaced and is still as it was read.

    Raises:
        SourceError: it changed, or it or its folder is read-only.
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
    """Replace a file's bytes in one step, keeping its mode; a kill leaves the old file or the new one.

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
            os.fchmod(file.fileno(), stat.S_IMODE(target.stat().st_mode))
            os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException:
        with suppress(FileNotFoundError):
            temporary.unlink()
        raise
