"""Formats that are not read as they are: recognized by content first and names second, each with its next step.

The formats are data, in `formats.toml`. A file's suffix never decides alone what it contains.
"""

from __future__ import annotations

import json
import os
import re
import stat
import struct
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from plans.errors import IncompleteError, UsageError
from plans.text import format_names, shorten

__all__ = [
    "PREFIX_BYTES",
    "Format",
    "RecognizedFormat",
    "check_address",
    "check_not_other_format",
    "find_method",
    "find_tensor_format",
    "hide_login",
    "load_formats",
    "recognize_content",
    "recognize_file",
    "recognize_folder",
    "recognize_name",
]

_FILE = Path(__file__).with_name("formats.toml")
PREFIX_BYTES = 512
"""How many of a file's first bytes tell its format."""

_MAX_JSON = 1_000_000
_MAX_HEADER = 2**20
"""How much of a safetensors header is searched for the names of tensors."""
_MAX_FILES = 10_000
_MAX_DEPTH = 3
_MAX_EXAMINED = 64
"""How many files of a folder are opened per format."""


@dataclass(frozen=True)
class Format:
    """A row of `formats.toml`, which describes the fields."""

    name: str
    step: str
    source: str
    magic: str = ""
    names: tuple[str, ...] = ()
    keys: str = ""
    entry: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    schemes: tuple[str, ...] = ()
    destination: str = ""
    taken_by: str = ""
    read: bool = False
    state: bool = False

    def has_magic(self, prefix: bytes) -> bool:
        """Return whether a file with these first bytes has the format's magic."""
        return re.match(self.magic.encode("latin-1"), prefix, re.DOTALL) is not None

    def match_name(self, name: str) -> re.Match[str] | None:
        """Return the match of a path in the folder with the first of `names`."""
        return re.fullmatch(self.names[0], name) if self.names else None


@dataclass(frozen=True)
class RecognizedFormat:
    """A format that was recognized.

    Args:
        format: the format.
        step: the next step, with the facts of this case filled in.
        files: the files by which it was recognized, relative to their folder.
    """

    format: Format
    step: str
    files: tuple[str, ...] = ()

    def build_error(self, folder: Path) -> IncompleteError:
        """Return the error for a folder of this format."""
        return IncompleteError(
            f"{folder}: contains {self.format.name}: {format_names(self.files)}",
            hint=self.step,
            folder=str(folder),
            files=list(self.files),
            format=self.format.name,
        )


@cache
def load_formats() -> tuple[Format, ...]:
    """Return the table of formats, in the order in which they are tried."""
    rows: list[dict[str, Any]] = tomllib.loads(_FILE.read_text("utf-8"))["format"]
    return tuple(map(_parse_row, rows))


def _parse_row(row: Mapping[str, Any]) -> Format:
    fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}
    return Format(**fields)


def recognize_content(prefix: bytes) -> Format | None:
    """Return the format of a file by its first bytes alone, None if they do not tell."""
    return next((row for row in load_formats() if row.magic and not row.names and row.has_magic(prefix)), None)


def recognize_file(folder: Path, name: str) -> Format | None:
    """Return the format of one file of a folder, None if it is not known.

    Args:
        folder: the folder.
        name: the file's path in it, with `/` between its parts.
    """
    prefix = _read_prefix(folder / name)
    if prefix is None:
        return None
    for row in load_formats():
        if row.magic and row.has_magic(prefix) and (not row.names or row.match_name(name)):
            return row
    return None


def recognize_name(name: str) -> Format | None:
    """Return the first format that is known by such a name of a file alone, None if there is none."""
    return next((row for row in load_formats() if row.match_name(name) and not row.magic), None)


def check_not_other_format(file: Path, prefix: bytes) -> None:
    """Refuse a file whose content is of another format than the one that was expected.

    Args:
        file: the file's path.
        prefix: its first bytes.

    Raises:
        IncompleteError: the content is of a known format.
    """
    row = recognize_content(prefix[:PREFIX_BYTES])
    if row is not None:
        facts = {"folder": str(file.parent), "file": file.name, "count": "1"}
        raise IncompleteError(f"{file}: is {row.name}", hint=row.step.format_map(facts), file=str(file))


def recognize_folder(folder: Path, *, of_metadata: bool = False) -> RecognizedFormat | None:
    """Return the format of a folder that is no checkpoint in a layout of migrator's own, None if it is not known.

    Args:
        folder: the folder.
        of_metadata: try only formats that have a `.metadata` file, as torch's distributed checkpoints do.
    """
    contents = _FolderContents(folder)
    rows = (row for row in load_formats() if not of_metadata or any(r"\.metadata" in name for name in row.names))
    return next((recognized for row in rows if (recognized := contents.match(row)) is not None), None)


def find_method(settings: Mapping[str, Any]) -> Format | None:
    """Return the format of weights that a config's quantization settings describe, None if it is not known."""
    method = str(settings.get("quant_method") or "")
    rows = (row for row in load_formats() if method in row.methods)
    return next((row for row in rows if settings.keys() >= set(row.settings)), None)


def find_tensor_format(name: str) -> Format | None:
    """Return the format that stores a tensor under such a name, None if it is not known."""
    return next((row for row in load_formats() if row.keys and re.search(row.keys, name)), None)


def check_address(text: str, *, is_destination: bool = False) -> None:
    """Refuse an address where a path is expected; those that are read are parsed elsewhere.

    Args:
        text: what the user wrote.
        is_destination: whether something was to be written there.

    Raises:
        UsageError: the text is an address.
    """
    text = hide_login(text)
    for row in load_formats():
        for scheme in row.schemes:
            if match := re.fullmatch(scheme, text):
                step = row.destination if is_destination else row.step
                raise UsageError(
                    f"{shorten(text)}: {row.name}{', and nothing is written there' if is_destination else ''}",
                    hint=step.format_map({"address": text, **match.groupdict("")}),
                    source=text,
                )


def hide_login(text: str) -> str:
    """Return a text without the user names and passwords of the addresses in it."""
    return re.sub(r"(?<=://)[^/\s@]*@", "…@", text)


@dataclass(frozen=True)
class _FolderContents:
    """The files of a folder, listed once and opened when a format asks for them."""

    folder: Path

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self._walk(), key=lambda name: (name.count("/"), name)))

    def _walk(self) -> Iterator[str]:
        waiting = [(self.folder, 1)]
        count = 0
        while waiting:
            folder, depth = waiting.pop()
            try:
                entries = list(os.scandir(folder))
            except OSError:
                continue
            for entry in entries:
                count += 1
                if count > _MAX_FILES:
                    return
                if entry.is_dir(follow_symlinks=False):
                    if depth < _MAX_DEPTH and not entry.name.startswith("."):
                        waiting.append((Path(entry.path), depth + 1))
                else:
                    yield Path(entry.path).relative_to(self.folder).as_posix()

    def match(self, row: Format) -> RecognizedFormat | None:
        if row.keys:
            return self._match_keys(row)
        if not (row.names or row.magic or row.entry):
            return None
        selected = [name for name in self.names if row.match_name(name) or (not row.names and "/" not in name)]
        if row.names and not all(any(re.fullmatch(other, name) for name in self.names) for other in row.names):
            return None
        if row.magic:
            prefixes = ((name, _read_prefix(self.folder / name)) for name in selected[:_MAX_EXAMINED])
            selected = [name for name, prefix in prefixes if prefix is not None and row.has_magic(prefix)]
            if not selected:
                return None
        if row.entry:
            path = next((name for name in self.names if Path(name).name == row.entry[0]), None)
            if path is None or not _has_entry(self.folder / path, *row.entry[1:]):
                return None
            selected = [path] if not row.names else selected
        return self._recognize(row, selected)

    def _match_keys(self, row: Format) -> RecognizedFormat | None:
        files = [name for name in self.names if name.endswith(".safetensors") and "/" not in name][:_MAX_EXAMINED]
        selected = [name for name in files if any(re.search(row.keys, key) for key in _read_keys(self.folder / name))]
        return self._recognize(row, selected) if selected else None

    def _recognize(self, row: Format, selected: Sequence[str]) -> RecognizedFormat:
        facts = {"folder": str(self.folder), "file": selected[0], "count": str(len(selected))}
        match = row.match_name(selected[0])
        step = row.step.format_map(facts | (match.groupdict("") if match else {}))
        return RecognizedFormat(row, step, tuple(selected))


def _read_prefix(path: Path, size: int = PREFIX_BYTES) -> bytes | None:
    """Return a file's first bytes, None if it is not a regular file or cannot be read; pipes are not waited for."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return None
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with os.fdopen(descriptor, "rb") as stream:
            return stream.read(size)
    except OSError:
        return None


def _has_entry(path: Path, key: str, pattern: str) -> bool:
    text = _read_prefix(path, _MAX_JSON)
    try:
        value = json.loads(text or b"")
        for part in key.split("."):
            value = value[part]
    except (ValueError, KeyError, TypeError, RecursionError):
        return False
    return re.fullmatch(pattern, str(value)) is not None


def _read_keys(path: Path) -> Iterator[str]:
    """Yield the names of tensors in a safetensors header, or in its beginning if it is long."""
    prefix = _read_prefix(path, 8 + _MAX_HEADER)
    if prefix is None or len(prefix) < 8:
        return
    (length,) = struct.unpack("<Q", prefix[:8])
    text = prefix[8 : 8 + min(length, _MAX_HEADER)].decode(errors="replace")
    for match in re.finditer(r'"([^"\\]{1,1000})"\s*:\s*\{', text):
        yield match[1]
