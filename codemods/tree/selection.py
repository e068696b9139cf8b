"""Which findings a run reports: the selected files and models, less what ignore comments and configuration suppress.

`# migrator: ignore[MIG001]` suppresses one rule's finding and prevents its rewrite. A comment after code applies to its
own line; a comment alone on its line applies to the next line that holds code. It names the codes that it suppresses,
separated by commas; text after the bracket is for people. A comment that names no known code suppresses nothing and is
itself a finding; so is one whose code had nothing to suppress.
"""

from __future__ import annotations

import io
import re
import tokenize
from bisect import bisect_left
from collections.abc import Collection, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from codemods.files.config import Configuration
from codemods.files.sources import SourceFile
from plans.rule import Finding, load_rule, load_rules

__all__ = [
    "Ignore",
    "Selection",
    "Suppressions",
    "build_overruled_finding",
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
class Selection:
    """What a run may report on and write; other files are only read.

    Args:
        configuration: the project's configuration.
        changed_folders: the folders with changed files, None to select all.
    """

    configuration: Configuration = field(default_factory=Configuration)
    changed_folders: frozenset[Path] | None = None

    def includes(self, path: Path) -> bool:
        """Return whether a file may be reported on and written."""
        return self.configuration.is_included(path)

    def is_in_scope(self, paths: Iterable[Path]) -> bool:
        """Return whether a plan in these files is in scope: one changed file in one of their folders is enough.

        An owner and its copies change together, so a change beside any of them selects all of them.
        """
        return self.changed_folders is None or any(path.parent.resolve() in self.changed_folders for path in paths)


@dataclass
class Suppressions:
    """Decides which findings comments and configuration suppress, and records which comments took effect.

    Args:
        selection: what the run may report on.
    """

    selection: Selection = field(default_factory=Selection)
    _sources: dict[Path, SourceFile] = field(default_factory=dict)
    _ignores: dict[Path, tuple[Ignore, ...]] = field(default_factory=dict)
    _used: dict[Path, set[tuple[int, str]]] = field(default_factory=dict)

    def read_comments(self, source: SourceFile) -> None:
        """Add the ignore comments of a file."""
        if _can_contain_ignores(source.data) and (ignores := read_ignores(source.body)):
            self._sources[source.path] = source
            self._ignores[source.path] = ignores

    def is_suppressed(self, path: Path, lines: Container[int], code: str) -> bool:
        """Return whether a finding is suppressed.

        Args:
            path: the finding's file.
            lines: the lines that the finding is about.
            code: the finding's code.
        """
        if suppressed := find_suppressed_lines(self._ignores.get(path, ()), lines, code):
            self._used.setdefault(path, set()).update((line, code) for line in suppressed)
            return True
        return self.selection.configuration.is_ignored(path, code)

    def find_unused(self) -> Iterator[tuple[Path, int, Finding]]:
        """Yield a finding for every comment that suppressed nothing; call it after all other findings are decided.

        Generated files are left out: their comments come from the modular file and are fixed there. Comments that
        ignore an edit which the owner makes are reported with that edit.
        """
        for path, ignores in self._ignores.items():
            if self._sources[path].generated_from or not self.selection.is_in_scope([path]):
                continue
            for line, finding in find_unused_ignores(ignores, self._used.get(path, set())):
                if not self.selection.configuration.is_ignored(path, finding.code):
                    yield path, line, finding


@dataclass(frozen=True)
class Ignore:
    """One ignore comment.

    Args:
        line: the comment's line, counted from 1.
        target_line: the line whose findings it suppresses.
        codes: the codes it names, as written.
    """

    line: int
    target_line: int
    codes: tuple[str, ...]

    @property
    def unknown_codes(self) -> tuple[str, ...]:
        """The named codes that no rule has; a comment without any code names the empty one."""
        return tuple(code for code in self.codes or ("",) if code not in load_rules())


def _can_contain_ignores(data: bytes) -> bool:
    """Return whether a file's bytes can hold an ignore comment, which most files can be ruled out by."""
    return any(mark in data for mark in _MARKS)


def read_ignores(body: bytes) -> tuple[Ignore, ...]:
    """Return the ignore comments of a file; text inside strings does not count.

    Args:
        body: the file's text as UTF-8. Text that cannot be tokenized has none; parsing the file reports why.
    """
    if not _can_contain_ignores(body):
        return ()
    try:
        return tuple(_parse_ignores(io.StringIO(body.decode(), newline=None)))
    except (tokenize.TokenError, SyntaxError, UnicodeDecodeError):
        return ()


def find_suppressed_lines(ignores: Iterable[Ignore], lines: Container[int], code: str) -> frozenset[int]:
    """Return those of the given lines on which a comment suppresses a code."""
    return frozenset(ignore.target_line for ignore in ignores if ignore.target_line in lines and code in ignore.codes)


def find_unused_ignores(
    ignores: Iterable[Ignore], suppressed: Collection[tuple[int, str]]
) -> Iterator[tuple[int, Finding]]:
    """Yield a finding for every code of a comment that suppressed nothing, with the comment's line.

    Args:
        ignores: a file's comments.
        suppressed: the line and code of each finding in the file that comments suppressed.
    """
    for ignore in ignores:
        for code in ignore.unknown_codes:
            yield ignore.line, _build_no_code_finding(code or "ignore")
        for code in ignore.codes:
            if code not in ignore.unknown_codes and (ignore.target_line, code) not in suppressed:
                yield ignore.line, _build_unused_finding(code, code, f"nothing here is {code}")


def build_overruled_finding(code: str, key: str, owner: str) -> Finding:
    """Return the finding about an ignore comment in a generated copy, which has no effect because the owner decides.

    Args:
        code: the ignored code.
        key: the entry's key.
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
    """Return the line itself if it holds code, else the next one that does."""
    index = bisect_left(code_lines, line)
    return code_lines[index] if index < len(code_lines) else line


def _build_unused_finding(code: str, key: str, where: str) -> Finding:
    return Finding("MIG901", key, load_rule("MIG901").message.format(key=code, where=where))


def _build_no_code_finding(key: str) -> Finding:
    return Finding("MIG902", key, load_rule("MIG902").message.format(key=key))
