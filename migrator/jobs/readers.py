"""Readers for the values of a job file; each refuses a value of another kind with its file, line and key."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

from migrator.options.external import ConfigName, ExternalOptions, is_address
from migrator.settings import Validate, Verify
from plans.dialect_file import is_dialect_file
from plans.errors import UsageError
from plans.text import suggest_name

__all__ = [
    "EXTERNAL_SETTINGS",
    "SettingLocation",
    "SettingReader",
    "list_external_files",
    "make_choice_reader",
    "read_checkpoint_name",
    "read_dialect_name",
    "read_flag",
    "read_fraction",
    "read_name",
    "read_output",
    "read_path",
    "read_paths",
    "read_seconds",
    "read_size",
    "read_text",
    "read_texts",
]


_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_HEADER = re.compile(r"\s*\[\[?\s*[\"']?(\w+)[\"']?\s*\]")


@dataclass(frozen=True)
class SettingLocation:
    """The place of a value in a job file.

    Args:
        file: the job file.
        content: the file's text.
        table: the table's name, empty at the top level.
        number: the table's index among those of the same name.
        key: the value's key, empty for the table itself.
    """

    file: Path
    content: str
    table: str = ""
    number: int = 0
    key: str = ""

    def refuse(self, problem: str, hint: str) -> NoReturn:
        """Refuse the value.

        Raises:
            UsageError: always.
        """
        line, setting = self.line, ".".join(filter(None, (self.table, self.key)))
        where = f"{self.file}:{line}" if line else str(self.file)
        raise UsageError(f"{where}: {setting} {problem}", hint=hint, path=str(self.file), key=setting, line=line)

    @property
    def line(self) -> int | None:
        """The line of the key, counted from 1; None if its spelling is not recognized."""
        key = re.compile(rf"\s*[\"']?{re.escape(self.key)}[\"']?\s*[=.]")
        table, seen = "", -1
        for line, text in enumerate(self.content.splitlines(), 1):
            if header := _HEADER.match(text):
                table = header[1]
                seen += table == self.table
            is_here = table == self.table and (not self.table or seen == self.number)
            if is_here and (key.match(text) if self.key else header):
                return line
            if header and not self.table and table == self.key:
                return line
        return None


SettingReader = Callable[[SettingLocation, Any], Any]


def read_text(location: SettingLocation, value: object) -> str:
    """Read a string that is not blank."""
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        location.refuse(f"is {value!r}, not a non-blank string without NUL", f'write {location.key} = "…"')
    return value


def read_texts(location: SettingLocation, value: object) -> tuple[str, ...]:
    """Read a list of texts."""
    if not isinstance(value, list) or not value:
        location.refuse(f"is {value!r}, not a list of texts", f'write {location.key} = ["…"]')
    return tuple(read_text(location, text) for text in value)


def read_name(location: SettingLocation, value: object) -> str:
    """Read a name that can be a file name."""
    name = read_text(location, value)
    if not _NAME.fullmatch(name):
        location.refuse(f"is {name!r}, not a name", "use letters, digits, `-`, `_` and `.` only")
    return name


def read_flag(location: SettingLocation, value: object) -> bool:
    """Read a boolean."""
    if not isinstance(value, bool):
        location.refuse(f"is {value!r}, not true or false", f"write {location.key} = true")
    return value


def read_size(location: SettingLocation, value: object) -> int:
    """Read an integer above 0."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        location.refuse(f"is {value!r}, not a whole number above 0", f"write for example {location.key} = 2")
    return value


def read_seconds(location: SettingLocation, value: object) -> float:
    """Read a finite number of seconds above 0."""
    return _read_number(location, value, math.inf, "a number of seconds above 0")


def read_fraction(location: SettingLocation, value: object) -> float:
    """Read a number between 0 and 1, exclusive."""
    return _read_number(location, value, 1, "a number between 0 and 1")


def make_choice_reader(*names: str) -> SettingReader:
    """Return a reader that accepts one of some names."""

    def read(location: SettingLocation, value: object) -> str:
        if value not in names:
            location.refuse(f"is {value!r}", suggest_name(str(value), names, f"use one of {', '.join(names)}"))
        return str(value)

    return read


def make_choices_reader(*names: str) -> SettingReader:
    """Return a reader that accepts one of some names, or a list of them."""
    read_one = make_choice_reader(*names)

    def read(location: SettingLocation, value: object) -> tuple[object, ...]:
        return tuple(read_one(location, one) for one in (value if isinstance(value, list) else [value]))

    return read


def read_path(location: SettingLocation, value: object) -> Path:
    """Read a path relative to the job file; its parent folders are resolved, without `..` and links."""
    path = (location.file.parent / read_text(location, value)).absolute()
    if path.name in ("", ".."):
        return Path(os.path.realpath(path))
    return Path(os.path.realpath(path.parent), path.name)


def read_output(location: SettingLocation, value: object) -> Path:
    """Read a path that something is written to, which cannot be an address."""
    from runtime.formats import check_address

    try:
        check_address(read_text(location, value), is_destination=True)
    except UsageError as error:
        location.refuse(f"is {error.message}", error.hint)
    return read_path(location, value)


def read_paths(location: SettingLocation, value: object) -> tuple[Path, ...]:
    """Read a list of paths."""
    if not isinstance(value, list) or not value:
        location.refuse(f"is {value!r}, not a list of paths", f'write {location.key} = ["…"]')
    return tuple(read_path(location, path) for path in value)


def read_checkpoint_name(location: SettingLocation, value: object) -> str:
    """Read the folder of a checkpoint, relative to the job file, or its address."""
    source = read_text(location, value)
    return source if is_address(source) else str(read_path(location, source))


def read_dialect_name(location: SettingLocation, value: object) -> str:
    """Read the name of a dialect, or the path of a file with one, relative to the job file."""
    name = read_text(location, value)
    return str(read_path(location, name)) if is_dialect_file(name) else name


def _read_number(location: SettingLocation, value: object, limit: float, expected: str) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < limit:
        location.refuse(
            f"is {value!r}, not {expected}", f"write for example {location.key} = {1e-5 if limit == 1 else 60}"
        )
    return float(value)


def _make_reader(kind: type | tuple[str, ...]) -> SettingReader:
    return make_choice_reader(*kind) if isinstance(kind, tuple) else _READERS[kind]


_READERS: Mapping[type, SettingReader] = {
    str: read_text,
    int: read_size,
    Path: read_path,
    ConfigName: read_checkpoint_name,
}
EXTERNAL_SETTINGS: Mapping[str, SettingReader] = {
    setting.name: _make_reader(setting.metadata["kind"]) for setting in fields(ExternalOptions)
}
"""Readers of the settings for another stack's rank files, by their names, which are those of the steps' fields."""
_CONFIG = "config.json"


def list_external_files(step: object) -> tuple[Path, ...]:
    """Return the files that a step reads besides its checkpoints: a plan, a config.json, and digests."""
    digests = step.digests if isinstance(step, Verify | Validate) else None
    if isinstance(step, Validate):
        return tuple(path for path in (step.plan, digests) if path is not None)
    if not isinstance(step, ExternalOptions):
        return ()
    config = Path(step.config) if step.config is not None and not is_address(step.config) else None
    config = config / _CONFIG if config is not None and config.is_dir() else config
    return tuple(path for path in (step.plan, config, digests) if path is not None)
