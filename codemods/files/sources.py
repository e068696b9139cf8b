"""Finding, reading and decoding source files."""

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
from pathlib import Path, PurePath

from plans.errors import MigratorError, SourceError, UsageError

__all__ = ["SourceFile", "add_error_once", "find_sources", "format_path", "is_skipped", "read_source"]

_SKIPPED_FOLDERS = frozenset({"__pycache__", "node_modules"})
_GENERATED = re.compile(rb"automatically generated from (\S+?)\.?[ \r]*$", re.MULTILINE)
_PUNCTUATION = "`'\"*<>()[],;:."  # what may stand around a name in a sentence
_HEADER_BYTES = 2048
_HEADER_LINE = re.compile(rb"[ \t]*#+(?P<comment>.*)|[ \t]*(?P<docstring>\"{3}|'{3})?[ \t]*(?P<text>.*)")
_MODULAR_NAME = r"modular_(?!model_converter\.py)\w+\.py\b"  # the converter may be named beside what it converts
_SENTENCE_END = re.compile(r"(?<=[.;!])\s+")
_MADE_FROM = re.compile(
    r"\b(?:(?:auto|re)?-?generated|converted|produced|created|built|made|derived|compiled)\b"
    rf".*?(?P<name>{_MODULAR_NAME})",
    re.IGNORECASE,
)
_NOT_EDITED = re.compile(r"\b(?:do not|don't|never) (?:edit|change|modify|touch)\b|\bedits? will be", re.IGNORECASE)

# Without O_NONBLOCK, opening a named pipe waits for a writer; without O_BINARY, Windows translates line ends.
_OPEN_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


@dataclass(frozen=True)
class SourceFile:
    """A file and its content.

    Args:
        path: the path of the file.
        data: the bytes that were read.
    """

    path: Path
    data: bytes

    @cached_property
    def encoding(self) -> str:
        """The codec that its BOM or coding cookie declares, `utf-8` by default.

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
                hint="correct the coding cookie in its first two lines",
                path=str(self.path),
            ) from error

    @cached_property
    def body(self) -> bytes:
        """The text as UTF-8 without a BOM: the bytes in which `ast` counts columns.

        Raises:
            SourceError: the bytes are not text in the declared codec.
        """
        if self.encoding == "utf-8":
            return self.data
        try:
            return self.data.decode(self.encoding).encode()
        except (LookupError, UnicodeError) as error:
            raise SourceError(
                f"{format_path(self.path)}: is not {self.encoding} text: {error}",
                hint="declare its encoding with a coding cookie",
                path=str(self.path),
            ) from error

    @cached_property
    def lines(self) -> bytes:
        """`body` after a line end. Patterns can begin with a line end, which `re` finds much faster than `^`."""
        return b"\n" + self.body

    def encode_body(self, body: bytes) -> bytes:
        """Return the bytes of the file with a new body, in the same encoding and with the same BOM."""
        return body if self.encoding == "utf-8" else body.decode().encode(self.encoding)

    @cached_property
    def line_offsets(self) -> tuple[int, ...]:
        """The offset of each line in `body`; `bytes.splitlines` splits lines where Python's parser does."""
        return tuple(accumulate(map(len, self.body.splitlines(keepends=True)), initial=0))

    def offset(self, line: int, column: int) -> int:
        """Return the offset in `body` of a line, counted from 1, and a column in UTF-8 bytes."""
        return self.line_offsets[line - 1] + column

    @cached_property
    def generated_from(self) -> str | None:
        """The name of the modular file that the header names as the source, None if the file is not generated."""
        if match := _GENERATED.search(self.data, 0, _HEADER_BYTES):
            return re.split(r"[/\\]", match[1].decode("utf-8", "replace"))[-1].strip(_PUNCTUATION)
        head = self.data[:_HEADER_BYTES]
        name = _find_modular_name(_read_header(head)) if b"modular_" in head else None
        return name if name != self.path.name else None


def _read_header(head: bytes) -> str:
    """Return the words of the comments and the docstring that a file begins with, on one line."""
    words: list[str] = []
    quotes = b""
    for line in head.removeprefix(b"\xef\xbb\xbf").splitlines():
        match = _HEADER_LINE.fullmatch(line)
        assert match is not None
        if match["comment"] is None and not quotes:
            if not match["docstring"]:
                if match["text"]:
                    break
                continue
            quotes = match["docstring"]
            is_last = quotes in match["text"]
        else:
            is_last = bool(quotes) and quotes in line
        words += (match["comment"] or match["text"] or b"").decode("utf-8", "replace").split()
        if is_last:
            break
    return " ".join(words)


def _find_modular_name(header: str) -> str | None:
    """Return the modular file that a header says its file is made from, in whatever words; None if it does not."""
    for sentence in _SENTENCE_END.split(header):
        match = _MADE_FROM.search(sentence)
        if match and ".py" not in sentence[: match.start()]:  # "modeling_x.py is generated from modular_x.py"
            return match["name"]
    names = set(re.findall(_MODULAR_NAME, header))
    return names.pop() if len(names) == 1 and _NOT_EDITED.search(header) else None


def format_path(path: Path) -> str:
    """Return a path as text for people: relative to the current folder if it is below it."""
    current = Path.cwd()
    return str(path.relative_to(current)) if path.is_relative_to(current) else str(path)


def add_error_once(errors: list[MigratorError], error: MigratorError) -> None:
    """Append an error unless it is known already: several plans may lead to the same broken file."""
    if error.message not in {known.message for known in errors}:
        errors.append(error)


def find_sources(paths: Iterable[Path], unreadable: list[MigratorError], links: list[Path] | None = None) -> list[Path]:
    """Return the Python files among and below the paths, resolved, sorted and without duplicates.

    Links below the paths are not followed: their targets are found at their own locations, or lie outside the paths.

    Args:
        paths: files and folders; links among them are followed.
        unreadable: a list to which the errors of folders that cannot be read are added.
        links: a list to which links to Python files outside the paths are added.

    Raises:
        UsageError: a path does not exist.
    """
    sources: dict[str, None] = {}
    folders: list[Path] = []
    links_below: dict[str, None] = {}
    for path in paths:
        if path.is_dir():
            folders.append(path.resolve())
            files, links_in_folder = _walk(str(folders[-1]), unreadable)
            sources |= dict.fromkeys(sorted(files))
            links_below |= dict.fromkeys(sorted(links_in_folder))
        elif path.exists():
            sources[str(path.resolve())] = None
        else:
            raise UsageError(
                f"{format_path(path)}: no such file or folder", hint="name files or folders that exist", path=str(path)
            )
    if links is not None:
        links += (link for link in map(Path, links_below) if not _is_below(link.resolve(), folders))
    return list(map(Path, sources))


def is_skipped(path: PurePath) -> bool:
    """Return whether `find_sources` leaves a file out below a folder: a hidden one, or one in a folder of no sources.

    Args:
        path: the file's path from that folder.
    """
    return path.suffix != ".py" or any(part.startswith(".") or part in _SKIPPED_FOLDERS for part in path.parts)


def _is_below(path: Path, folders: Iterable[Path]) -> bool:
    return any(path.is_relative_to(folder) for folder in folders)


def _walk(top: str, unreadable: list[MigratorError]) -> tuple[list[str], list[str]]:
    """Return the Python files below a folder, and the links to Python files; hidden files and folders are skipped."""
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
            unreadable.append(SourceError(what, hint="make it readable, or leave it out", path=folder))
    return files, links


def _sort_entries(entries: Iterable[os.DirEntry[str]], files: list[str], links: list[str]) -> list[str]:
    """Add a folder's Python files and links to Python files to the lists, and return its subfolders."""
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
    except OSError:  # a link to itself, or into a folder that cannot be entered
        return False


def read_source(path: Path) -> SourceFile:
    """Read one file.

    Raises:
        SourceError: the file cannot be read.
    """
    try:
        descriptor = os.open(path, _OPEN_FLAGS)
        try:
            state = os.fstat(descriptor)
            if not stat.S_ISREG(state.st_mode):
                raise OSError(0, "is not a regular file")
            return SourceFile(path, _read_all(descriptor, state.st_size))
        finally:
            os.close(descriptor)
    except OSError as error:
        raise SourceError(
            f"{format_path(path)}: {error.strerror}", hint="make it readable, or leave it out", path=str(path)
        ) from error


def _read_all(descriptor: int, size: int) -> bytes:
    """Read a file to its end, without a file object: creating one takes longer than reading most source files."""
    chunks = [os.read(descriptor, size + 1)]
    while len(chunks[-1]) > 0 and sum(map(len, chunks)) != size:
        chunks.append(os.read(descriptor, 1 << 20))
    return b"".join(chunks)
