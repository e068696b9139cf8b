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
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

from plans.decompose import Edit
from plans.rule import Finding, all_rules, rule

__all__ = ["IGNORE_MARK", "Ignore", "held_decisions", "read_ignores", "silences", "unused_ignores", "without_held"]

IGNORE_MARK = b"migrator:"
"""What every ignore comment holds; a file without it has none."""

_COMMENT = r"migrator:\s*ignore\b(?:\s*\[(?P<codes>[^\]]*)\])?"
_NO_CODE = frozenset(
    {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
)


@dataclass(frozen=True)
class Ignore:
    """One ignore comment.

    Args:
        line: where it stands, counted from 1.
        speaks_of: the line whose findings it silences.
        codes: those it names, as written.
    """

    line: int
    speaks_of: int
    codes: tuple[str, ...]

    @property
    def unknown(self) -> tuple[str, ...]:
        """What it names that is no rule's code; a comment without any code names the empty one."""
        return tuple(code for code in self.codes or ("",) if code not in all_rules())


def read_ignores(body: bytes) -> tuple[Ignore, ...]:
    """Return the ignore comments of a file; a string that only looks like one is none.

    Args:
        body: the file's text as UTF-8. What does not tokenize has none: whoever parses the file says what is wrong.
    """
    if IGNORE_MARK not in body:
        return ()
    try:
        return tuple(_ignores(io.StringIO(body.decode(), newline=None)))
    except (tokenize.TokenError, SyntaxError, UnicodeDecodeError):
        return ()


def silences(ignores: Iterable[Ignore], line: int, code: str) -> bool:
    """Say whether a comment silences a code on a line."""
    return any(ignore.speaks_of == line and code in ignore.codes for ignore in ignores)


def held_decisions(edits: Iterable[Edit], is_ignored: Callable[[Edit], bool]) -> frozenset[str]:
    """Return the decisions that an ignored edit holds back.

    The entries of one experts module are one decision: where one of them is ignored none is made, because half of
    them would leave the module half migrated.

    Args:
        edits: of an owner's plan.
        is_ignored: says whether a comment or the configuration silences an edit's code on its line.
    """
    return frozenset(_decision(edit) for edit in edits if is_ignored(edit))


def without_held(edits: Iterable[Edit], held: frozenset[str]) -> tuple[Edit, ...]:
    """Return the edits of a plan, the owner's or a copy's, whose decision is not held back."""
    return tuple(edit for edit in edits if _decision(edit) not in held)


def unused_ignores(ignores: Iterable[Ignore], silenced: Collection[tuple[int, str]]) -> Iterator[tuple[int, Finding]]:
    """Yield a finding for every code of a comment that silenced nothing, with the comment's line.

    Args:
        ignores: a file's comments.
        silenced: line and code of everything in the file that comments kept quiet.
    """
    for ignore in ignores:
        for code in ignore.unknown:
            yield ignore.line, _finding("MIG902", code or "ignore")
        for code in ignore.codes:
            if code not in ignore.unknown and (ignore.speaks_of, code) not in silenced:
                yield ignore.line, _finding("MIG901", code)


def _ignores(text: io.StringIO) -> Iterator[Ignore]:
    tokens = list(tokenize.generate_tokens(text.readline))
    code_lines = sorted({token.start[0] for token in tokens if token.type not in _NO_CODE})
    for token in tokens:
        if token.type == tokenize.COMMENT:
            for match in re.finditer(_COMMENT, token.string):
                codes = tuple(filter(None, map(str.strip, (match["codes"] or "").split(","))))
                yield Ignore(token.start[0], _line_of_code(code_lines, token.start[0]), codes)


def _line_of_code(code_lines: Sequence[int], line: int) -> int:
    """Return the line itself or the next one that holds code."""
    place = bisect_left(code_lines, line)
    return code_lines[place] if place < len(code_lines) else line


def _decision(edit: Edit) -> str:
    module, _, _ = edit.key.rpartition(".")
    return module if module.rpartition(".")[2] == "experts" else edit.key


def _finding(code: str, key: str) -> Finding:
    return Finding(code, key, rule(code).message.format(key=key))
