"""Values of a job file, each read by its kind; what is no value of the kind is refused with file, line and key."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from migrator.jobs.values import is_hosted
from plans.alike import did_you_mean
from plans.errors import UsageError

__all__ = [
    "Place",
    "Reader",
    "checkpoint",
    "choice",
    "flag",
    "fraction",
    "name",
    "path",
    "paths",
    "seconds",
    "size",
    "text",
]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_HEADER = re.compile(r"\s*\[\[?\s*[\"']?(\w+)[\"']?\s*\]")


@dataclass(frozen=True)
class Place:
    """Where a value stands.

    Args:
        file: the job file.
        content: its text.
        table: the table's name, empty at the top.
        number: of the table among those of its name, counted from 0.
        key: of the value, empty for the table itself.
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
        line, called = self.line, ".".join(filter(None, (self.table, self.key)))
        where = f"{self.file}:{line}" if line else str(self.file)
        raise UsageError(f"{where}: {called} {problem}", hint=hint, path=str(self.file), key=called, line=line)

    @property
    def line(self) -> int | None:
        """The line of the key, counted from 1; None where it is written in a way that is not looked for."""
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


Reader = Callable[[Place, Any], Any]


def text(place: Place, value: object) -> str:
    """Read a string that is not empty."""
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        place.refuse(f"is {value!r}, not a string with something in it", f'write {place.key} = "…"')
    return value


def name(place: Place, value: object) -> str:
    """Read a name that a file may have."""
    found = text(place, value)
    if not _NAME.fullmatch(found):
        place.refuse(f"is {found!r}, not a name", "letters, digits, `-`, `_` and `.` make up a name")
    return found


def flag(place: Place, value: object) -> bool:
    """Read true or false."""
    if not isinstance(value, bool):
        place.refuse(f"is {value!r}, not true or false", f"write {place.key} = true")
    return value


def size(place: Place, value: object) -> int:
    """Read a whole number above 0."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        place.refuse(f"is {value!r}, not a whole number above 0", f"write {place.key} = 2, say")
    return value


def seconds(place: Place, value: object) -> float:
    """Read a time that ends."""
    return _number(place, value, math.inf, "a number of seconds above 0")


def fraction(place: Place, value: object) -> float:
    """Read a number between 0 and 1."""
    return _number(place, value, 1, "a number between 0 and 1")


def choice(*names: str) -> Reader:
    """Return what reads one of some names."""

    def read(place: Place, value: object) -> str:
        if value not in names:
            place.refuse(f"is {value!r}", did_you_mean(str(value), names, f"it is one of {', '.join(names)}"))
        return str(value)

    return read


def path(place: Place, value: object) -> Path:
    """Read a path, relative to the job file; the folders above it are spelled in one way, without `..` and links."""
    found = (place.file.parent / text(place, value)).absolute()
    if found.name in ("", ".."):
        return Path(os.path.realpath(found))
    return Path(os.path.realpath(found.parent), found.name)


def paths(place: Place, value: object) -> tuple[Path, ...]:
    """Read a list of paths."""
    if not isinstance(value, list) or not value:
        place.refuse(f"is {value!r}, not a list of paths", f'write {place.key} = ["…"]')
    return tuple(path(place, one) for one in value)


def checkpoint(place: Place, value: object) -> str:
    """Read a checkpoint's folder, relative to the job file, or its name on the hub."""
    found = text(place, value)
    return found if is_hosted(found) else str(path(place, found))


def _number(place: Place, value: object, limit: float, what: str) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < limit:
        place.refuse(f"is {value!r}, not {what}", f"write {place.key} = {1e-5 if limit == 1 else 60}, say")
    return float(value)
