"""Source files: found, read, decoded and replaced, byte for byte outside what changed."""

from __future__ import annotations

import io
import os
import re
import stat
import tempfile
import tokenize
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path

from plans.errors import SourceError, UsageError

__all__ = ["Source", "find_sources", "read_source", "replace_source", "shown"]

_SKIPPED_FOLDERS = frozenset({"__pycache__", "node_modules"})
_GENERATED = re.compile(rb"automatically generated from (\S+?)\.? *$", re.MULTILINE)
_HEADER_BYTES = 2048


@dataclass(frozen=True)
class Source:
    """One file as it was read.

    Args:
        path: where it was found.
        data: its bytes.
    """

    path: Path
    data: bytes

    @cached_property
    def encoding(self) -> str:
        """The codec that its BOM or coding cookie declares, `utf-8` without one.

        Raises:
            SourceError: the declared codec does not exist or contradicts the BOM.
        """
        try:
            return tokenize.detect_encoding(io.BytesIO(self.data).readline)[0]
        except SyntaxError as error:
            raise SourceError(
                f"{shown(self.path)}: {error.msg}",
                hint="mend the coding cookie in its first two lines",
                path=str(self.path),
            ) from error

    @cached_property
    def body(self) -> bytes:
        """Its text as UTF-8 without a BOM: the bytes that `ast` counts columns in.

        Raises:
            SourceError: the bytes are not text in the declared codec.
        """
        if self.encoding == "utf-8":
            return self.data
        try:
            return self.data.decode(self.encoding).encode()
        except UnicodeDecodeError as error:
            raise SourceError(
                f"{shown(self.path)}: not {self.encoding} text at byte {error.start}",
                hint="declare its encoding with a coding cookie",
                path=str(self.path),
            ) from error

    def with_body(self, body: bytes) -> bytes:
        """Return the file's bytes for a new body, in its own encoding and with its BOM."""
        return body if self.encoding == "utf-8" else body.decode().encode(self.encoding)

    @cached_property
    def line_offsets(self) -> tuple[int, ...]:
        """Where each line of `body` begins; bytes split into lines where Python's parser does."""
        return tuple(accumulate(map(len, self.body.splitlines(keepends=True)), initial=0))

    def offset(self, line: int, column: int) -> int:
        """Return the place in `body` of a line counted from 1 and a column in UTF-8 bytes."""
        return self.line_offsets[line - 1] + column

    @cached_property
    def generated_from(self) -> str | None:
        """The file name of the modular file that the header says it was generated from, None if hand-written."""
        match = _GENERATED.search(self.data, 0, _HEADER_BYTES)
        return match[1].decode("utf-8", "replace").rpartition("/")[2] if match else None


def shown(path: Path) -> str:
    """Return a path as people want to read it: relative to the current folder where it lies below it."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def find_sources(paths: Iterable[Path]) -> list[Path]:
    """Return the Python files among and below the paths, absolute and sorted; links to folders are not followed.

    Raises:
        UsageError: a path does not exist.
    """
    found: dict[Path, None] = {}
    for path in map(Path.absolute, paths):
        if path.is_dir():
            found |= dict.fromkeys(map(Path, sorted(_walk(str(path)))))
        elif path.exists():
            found[path] = None
        else:
            raise UsageError(
                f"{shown(path)}: no such file or folder", hint="name files or folders that exist", path=str(path)
            )
    return list(found)


def _walk(folder: str) -> Iterator[str]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                if entry.name not in _SKIPPED_FOLDERS and not entry.name.startswith("."):
                    yield from _walk(entry.path)
            elif entry.name.endswith(".py"):
                yield entry.path


def read_source(path: Path) -> Source:
    """Read one file.

    Raises:
        SourceError: it cannot be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            return Source(path, _read_all(descriptor))
        finally:
            os.close(descriptor)
    except OSError as error:
        raise SourceError(
            f"{shown(path)}: {error.strerror}", hint="make it a readable file or leave it out", path=str(path)
        ) from error


def _read_all(descriptor: int) -> bytes:
    """Read a file to its end; file objects take longer to set up than most of these files take to read."""
    size = os.fstat(descriptor).st_size
    pieces = [os.read(descriptor, size + 1)]
    while len(pieces[-1]) > 0 and sum(map(len, pieces)) != size:
        pieces.append(os.read(descriptor, 1 << 20))
    return b"".join(pieces)


def replace_source(source: Source, data: bytes) -> None:
    """Replace a file's bytes in one step, keeping its mode; a kill leaves the old file or the new one.

    Raises:
        SourceError: the file changed since it was read, or cannot be replaced.
    """
    target = source.path.resolve()
    try:
        if target.read_bytes() != source.data:
            raise SourceError(
                f"{shown(source.path)}: changed by someone else since it was read",
                hint="run again",
                path=str(source.path),
            )
        if not os.access(target, os.W_OK):
            raise PermissionError(0, "is read-only")
        _write_beside(target, data)
    except OSError as error:
        raise SourceError(
            f"{shown(source.path)}: {error.strerror}", hint="make it writable or leave it out", path=str(source.path)
        ) from error


def _write_beside(target: Path, data: bytes) -> None:
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
