"""A file's changes as the smallest text replacements, by line and column."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from codemods.files.sources import SourceFile
from codemods.tree.outcome import Change

__all__ = ["Replacement", "compute_replacements"]

_Position = tuple[int, int]
"""Line and column, both counted from 1, columns in characters."""


@dataclass(frozen=True)
class Replacement:
    """A text that replaces the characters between two positions.

    Args:
        start: the position of the first character that is replaced.
        end: the position of the first character that is kept; equal to `start` if text is only inserted.
        text: the new text.
    """

    start: _Position
    end: _Position
    text: str


def compute_replacements(change: Change) -> list[Replacement]:
    """Return the replacements, in the file's order, that turn a file into exactly `change.data`."""
    before, after = _decode_lines(change.source), _decode_lines(SourceFile(change.path, change.data))
    return list(_iter_replacements(before, after))


def _decode_lines(source: SourceFile) -> list[str]:
    return [line.decode() for line in source.body.splitlines(keepends=True)]


def _iter_replacements(before: Sequence[str], after: Sequence[str]) -> Iterator[Replacement]:
    for kind, first, last, new_first, new_last in difflib.SequenceMatcher(None, before, after, False).get_opcodes():
        if kind == "replace" and last - first == new_last - new_first:
            # As many lines as before: replace each on its own, so that a replacement covers an entry, not a block.
            for line, new in zip(range(first, last), after[new_first:new_last], strict=True):
                yield _trim_common(before, line, line + 1, new)
        elif kind != "equal":
            yield _trim_common(before, first, last, "".join(after[new_first:new_last]))


def _trim_common(before: Sequence[str], first: int, last: int, new: str) -> Replacement:
    """Return the replacement of whole lines, without their common prefix and suffix."""
    old = "".join(before[first:last])
    head = _common_prefix_length(old, new)
    tail = _common_prefix_length(old[head:][::-1], new[head:][::-1])
    start, end = _find_position(before, first, head), _find_position(before, first, len(old) - tail)
    return Replacement(start, end, new[head : len(new) - tail])


def _common_prefix_length(first: str, second: str) -> int:
    """Return the length of the longest common prefix of two texts."""
    return next(
        (index for index, pair in enumerate(zip(first, second, strict=False)) if pair[0] != pair[1]),
        min(len(first), len(second)),
    )


def _find_position(lines: Sequence[str], line: int, offset: int) -> _Position:
    """Return the position `offset` characters after the beginning of a line."""
    while line < len(lines) and offset >= len(lines[line]) and lines[line].endswith(("\n", "\r")):
        offset -= len(lines[line])
        line += 1
    return line + 1, offset + 1
