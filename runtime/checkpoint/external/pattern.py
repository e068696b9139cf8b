"""Patterns of file names, `model{rank}-mp{world}.safetensors`: which file of a folder is which rank's."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from string import Formatter
from typing import NamedTuple

from plans.errors import UsageError
from plans.text import shorten

__all__ = ["FilePattern", "ParsedFileName"]

_FIELDS = ("rank", "world", "part")
_FORMAT = re.compile(r"(0[1-9])?d?")
_NUMBER = r"[0-9]{1,9}"
_HINT = "write it like 'model{rank}-mp{world}.safetensors' or 'model-rank-{rank}-part-{part:05d}.safetensors'"


class ParsedFileName(NamedTuple):
    """What the name of a file says: whose it is, of how many ranks where it says so, and which of that rank's parts."""

    rank: int
    world: int | None
    part: int | None


class _Segment(NamedTuple):
    """Text that every name has, and the number behind it, None at the end."""

    text: str
    field: str | None
    format_spec: str


@dataclass(frozen=True)
class FilePattern:
    """A pattern with `{rank}` and, if need be, `{world}` and `{part}`, each with a width such as `{rank:05d}`.

    Args:
        text: as a user writes it.

    Raises:
        UsageError: it is no pattern of safetensors files of one folder, or could be read in two ways.
    """

    text: str

    def __post_init__(self) -> None:
        if "/" in self.text or "\\" in self.text:
            raise self._error("has a path in it", "name the folder as SOURCE, and files in it by the pattern")
        if not self.text.endswith(".safetensors"):
            raise self._error("does not end in .safetensors", "other formats are not read; save them as safetensors")
        fields = [piece.field for piece in self._segments if piece.field is not None]
        if "rank" not in fields:
            raise self._error("has no {rank}", _HINT)
        if len(set(fields)) < len(fields):
            raise self._error("names a number twice", _HINT)
        for piece, after in pairwise(self._segments):
            if piece.field and after.field and not re.search(r"\D", after.text):
                raise self._error(
                    f"has nothing between {{{piece.field}}} and {{{after.field}}} to tell them apart", _HINT
                )

    def __str__(self) -> str:
        return self.text

    @property
    def has_parts(self) -> bool:
        """Whether a rank may have several files."""
        return any(piece.field == "part" for piece in self._segments)

    def parse(self, name: str) -> ParsedFileName | None:
        """Return what a file's name says, None where the pattern would not have made it."""
        found = re.fullmatch("".join(map(_to_regex, self._segments)), name)
        if found is None:
            return None
        numbers = {field: int(text) for field, text in found.groupdict().items()}
        written = "".join(p.text + (format(numbers[p.field], p.format_spec) if p.field else "") for p in self._segments)
        return ParsedFileName(numbers["rank"], numbers.get("world"), numbers.get("part")) if written == name else None

    @property
    def _segments(self) -> tuple[_Segment, ...]:
        return tuple(self._parse_segments())

    def _parse_segments(self) -> Iterator[_Segment]:
        try:
            parsed = list(Formatter().parse(self.text))
        except ValueError as error:
            raise self._error(f"is no pattern: {error}", _HINT) from error
        for text, field, form, conversion in parsed:
            if field is not None and (field not in _FIELDS or conversion or not _FORMAT.fullmatch(form or "")):
                raise self._error(
                    f"has a field {shorten(repr(field))} that is not {{rank}}, {{world}} or {{part}} with a width",
                    _HINT,
                )
            yield _Segment(text, field, form or "")

    def _error(self, what: str, hint: str) -> UsageError:
        return UsageError(f"`from_pattern` {shorten(repr(self.text))} {what}", hint=hint, pattern=self.text)


def _to_regex(segment: _Segment) -> str:
    return re.escape(segment.text) + (f"(?P<{segment.field}>{_NUMBER})" if segment.field else "")
