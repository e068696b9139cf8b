"""Ignore comments: `# migrator: ignore[MIG001]` keeps one finding quiet, and its rewrite from happening.

A comment after code speaks of its own line; a comment alone on its line speaks of the next line that holds code. It
names the codes it silences, divided by commas; what follows the bracket is for people. A comment that names no known
code silences nothing and is a finding itself, and so is one whose code had nothing to silence.
"""

from __future__ import annotations

import io
import re
import tokenize
from bisect import bisect_left
from collections.abc import Collection, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass

from plans.rule import Finding, load_rule, load_rules

__all__ = [
    "Ignore",
    "build_overruled_finding",
    "can_contain_ignores",
    "find_suppressed_lines",
    "find_unused_ignores",
    "read_ignores",
]

_MARKS = (b"igrator:", b"IGRATOR:")
_COMMENT = r"(?i:migrator:\s*ignore)\b(?:\s*\[(?P<codes>[^\]]*)\])?"
_NO_CODE = frozenset(
    {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
)


@dataclass(frozen=True)
class Ignore:
    """One ignore comment.

    Args:
        line: where it stands, counted from 1.
        target_line: the line whose findings it silences.
        codes: those it names, as written.
    """

    line: int
    target_line: int
    codes: tuple[str, ...]

    @property
    def unknown_codes(self) -> tuple[str, ...]:
        """What it names that is no rule's code; a comment without any code names the empty one."""
        return tuple(code for code in self.codes or ("",) if code not in load_rules())


def can_contain_ignores(data: bytes) -> bool:
    """Say whether a file's bytes can hold an ignore comment; nearly none does."""
    return any(mark in data for mark in _MARKS)


def read_ignores(body: bytes) -> tuple[Ignore, ...]:
    """Return the ignore comments of a file; a string that only looks like one is none.

    Args:
        body: the file's text as UTF-8. What does not tokenize has none: whoever parses the file says what is wrong.
    """
    if not can_contain_ignores(body):
        return ()
    try:
        return tuple(_parse_ignores(io.StringIO(body.decode(), newline=None)))
    except (tokenize.TokenError, SyntaxError, UnicodeDecodeError):
        return ()


def find_suppressed_lines(ignores: Iterable[Ignore], lines: Container[int], code: str) -> frozenset[int]:
    """Return those among some lines on which a comment silences a code."""
    return frozenset(one.target_line for one in ignores if one.target_line in lines and code in one.codes)


def find_unused_ignores(
    ignores: Iterable[Ignore], suppressed: Collection[tuple[int, str]]
) -> Iterator[tuple[int, Finding]]:
    """Yield a finding for every code of a comment that silenced nothing, with the comment's line.

    Args:
        ignores: a file's comments.
        suppressed: line and code of everything in the file that comments kept quiet.
    """
    for ignore in ignores:
        for code in ignore.unknown_codes:
            yield ignore.line, _build_no_code_finding(code or "ignore")
        for code in ignore.codes:
            if code not in ignore.unknown_codes and (ignore.target_line, code) not in suppressed:
                yield ignore.line, _build_unused_finding(code, code, f"nothing here is {code}")


def build_overruled_finding(code: str, key: str, owner: str) -> Finding:
    """Return the finding for an ignored code in a generated copy, whose owner decides.

    Args:
        code: that is ignored.
        key: of the entry.
        owner: the owner's file.
    """
    return _build_unused_finding(code, key, f"{owner} owns this entry and decides")


def _parse_ignores(text: io.StringIO) -> Iterator[Ignore]:
    tokens = list(tokenize.generate_tokens(text.readline))
    code_lines = sorted({token.start[0] for token in tokens if token.type not in _NO_CODE})
    for token in tokens:
        if token.type == tokenize.COMMENT:
            for match in re.finditer(_COMMENT, token.string):
                codes = tuple(filter(None, map(str.strip, (match["codes"] or "").split(","))))
                yield Ignore(token.start[0], _find_code_line(code_lines, token.start[0]), codes)


def _find_code_line(code_lines: Sequence[int], line: int) -> int:
    """Return the line itself or the next one that holds code."""
    place = bisect_left(code_lines, line)
    return code_lines[place] if place < len(code_lines) else line


def _build_unused_finding(code: str, key: str, where: str) -> Finding:
    return Finding("MIG901", key, load_rule("MIG901").message.format(key=code, where=where))


def _build_no_code_finding(key: str) -> Finding:
    return Finding("MIG902", key, load_rule("MIG902").message.format(key=key))
