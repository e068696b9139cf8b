"""Source files: found, read and decoded."""

from __future__ import annotations

import io
import os
import re
import stat
import tokenize
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path

from plans.errors import MigratorError, SourceError, UsageError

__all__ = ["SourceFile", "add_error_once", "find_sources", "format_path", "read_source"]

_SKIPPED_FOLDERS = frozenset({"__pycache__", "node_modules"})
_GENERATED = re.compile(rb"automatically generated from (\S+?)\.?[ \r]*$", re.MULTILINE)
_HEADER_BYTES = 2048

# Without O_NONBLOCK, opening a named pipe waits for a writer; without O_BINARY, Windows translates line ends.
_OPEN_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


@dataclass(frozen=True)
class SourceFile:
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
        head = self.data[: self.data.find(b"\n", self.data.find(b"\n") + 1)]
        if head.isascii() and b"coding" not in head:
            return "utf-8"
        try:
            return tokenize.detect_encoding(io.BytesIO(self.data).readline)[0]
        except SyntaxError as error:
            raise SourceError(
                f"{format_path(self.path)}: {error.msg}",
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
        except (LookupError, UnicodeError) as error:
            raise SourceError(
                f"{format_path(self.path)}: not {self.encoding} text: {error}",
                hint="declare its encoding with a coding cookie",
                path=str(self.path),
            ) from error

    @cached_property
    def lines(self) -> bytes:
        """`body` after a line end, so that every line has one before it, which `re` finds far faster than `^`."""
        return b"\n" + self.body

    def encode_body(self, body: bytes) -> bytes:
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


def format_path(path: Path) -> str:
    """Return a path as people want to read it: relative to the current folder where it lies below it."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def add_error_once(errors: list[MigratorError], error: MigratorError) -> None:
    """Add what is wrong with a file, unless it is said already: several plans may lead to the file."""
    if error.message not in {known.message for known in errors}:
        errors.append(error)


def find_sources(paths: Iterable[Path], unreadable: list[MigratorError], links: list[Path] | None = None) -> list[Path]:
    """Return the Python files among and below the paths, each once, resolved and sorted.

    Links below the paths are not followed: what they lead to is found at its own place, or lies outside.

    Args:
        paths: files and folders; a link among them means what it leads to.
        unreadable: takes the errors of folders that cannot be listed.
        links: takes the links to Python files that lead out of the paths.

    Raises:
        UsageError: a path does not exist.
    """
    found: dict[str, None] = {}
    folders: list[Path] = []
    linked: dict[str, None] = {}
    for path in paths:
        if path.is_dir():
            folders.append(path.resolve())
            files, linking = _walk(str(folders[-1]), unreadable)
            found |= dict.fromkeys(sorted(files))
            linked |= dict.fromkeys(sorted(linking))
        elif path.exists():
            found[str(path.resolve())] = None
        else:
            raise UsageError(
                f"{format_path(path)}: no such file or folder", hint="name files or folders that exist", path=str(path)
            )
    if links is not None:
        links += (link for link in map(Path, linked) if not _is_below(link.resolve(), folders))
    return list(map(Path, found))


def _is_below(path: Path, folders: Iterable[Path]) -> bool:
    return any(path.is_relative_to(folder) for folder in folders)


def _walk(top: str, unreadable: list[MigratorError]) -> tuple[list[str], list[str]]:
    """Return the Python files below a folder, and the links to such; hidden ones are passed over."""
    files: list[str] = []
    links: list[str] = []
    waiting = [top]
    while waiting:
        folder = waiting.pop()
        try:
            with os.scandir(folder) as entries:
                waiting += reversed(_sort_entries(entries, files, links))
        except OSError as error:
            what = f"{format_path(Path(folder))}: {error.strerror}"
            unreadable.append(SourceError(what, hint="make it a readable folder or leave it out", path=folder))
    return files, links


def _sort_entries(entries: Iterable[os.DirEntry[str]], files: list[str], links: list[str]) -> list[str]:
    """Add a folder's Python files and links to such to the lists, and return the folders in it."""
    folders: list[str] = []
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir(follow_symlinks=False):
            if entry.name not in _SKIPPED_FOLDERS:
                folders.append(entry.path)
        elif entry.name.endswith(".py"):
            if entry.is_file(follow_symlinks=False):
                files.append(entry.path)
            elif entry.is_symlink() and _is_link_to_file(entry):
                links.append(entry.path)
    return folders


def _is_link_to_file(link: os.DirEntry[str]) -> bool:
    try:
        return link.is_file()
    except OSError:  # a link to itself, or into a folder that is closed
        return False


def read_source(path: Path) -> SourceFile:
    """Read one file.

    Raises:
        SourceError: it cannot be read.
    """
    try:
        descriptor = os.open(path, _OPEN_FLAGS)
        try:
            state = os.fstat(descriptor)
            if not stat.S_ISREG(state.st_mode):
                raise OSError(0, "is no regular file")
            return SourceFile(path, _read_all(descriptor, state.st_size))
        finally:
            os.close(descriptor)
    except OSError as error:
        raise SourceError(
            f"{format_path(path)}: {error.strerror}", hint="make it a readable file or leave it out", path=str(path)
        ) from error


def _read_all(descriptor: int, size: int) -> bytes:
    """Read a file to its end; file objects take longer to set up than most of these files take to read."""
    pieces = [os.read(descriptor, size + 1)]
    while len(pieces[-1]) > 0 and sum(map(len, pieces)) != size:
        pieces.append(os.read(descriptor, 1 << 20))
    return b"".join(pieces)
