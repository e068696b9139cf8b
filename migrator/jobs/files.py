"""A job's own files: each appears whole, and stamps tell whether one was touched since."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from plans.errors import DestinationError

__all__ = ["Stamps", "as_text", "files_below", "stamps", "write_whole", "writing"]

Stamps = Mapping[str, tuple[int, int, int]]
"""Size in bytes, time in nanoseconds and inode of files, by path: they change whenever one is written or replaced."""


def stamps(files: Iterable[Path]) -> Stamps:
    """Return the stamps of those files that are there."""
    found: dict[str, tuple[int, int, int]] = {}
    for file in files:
        with suppress(OSError):  # One that is gone has no stamp, and that is what tells.
            at = file.stat()
            found[str(file)] = (at.st_size, at.st_mtime_ns, at.st_ino)
    return found


def files_below(path: Path) -> Iterator[Path]:
    """Yield the files of a folder and its subfolders, or the path itself where it is none."""
    if not path.is_dir():
        yield path
    for folder, folders, names in os.walk(path):
        folders.sort()
        yield from (Path(folder, name) for name in sorted(names))


def as_text(value: object) -> str:
    """Return a value as the JSON text of a file."""
    return json.dumps(value, indent=2, default=str) + "\n"


def write_whole(file: Path, content: bytes) -> None:
    """Write a file in one step, its folder made where it is missing; a kill leaves the old one or the new one.

    Raises:
        DestinationError: it cannot be written.
    """
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
        try:
            with open(descriptor, "wb") as stream:  # noqa: PTH123 - a descriptor, not a path
                stream.write(content)
                stream.flush()
                os.fchmod(descriptor, 0o644)
                os.fsync(descriptor)
            Path(name).replace(file)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the system says when the body cannot write into an error for the user.

    Raises:
        DestinationError: it could not.
    """
    try:
        yield
    except OSError as error:
        raise DestinationError(
            f"{path}: {error.strerror or error}", hint="name an `output` that can be written", path=str(path)
        ) from error
