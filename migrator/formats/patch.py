"""Changes as a patch that `git apply` takes."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable
from pathlib import Path

from codemods.tree.outcome import Change

__all__ = ["format_patch"]

_LINES = re.compile(rb"[^\n]*\n|[^\n]+")
_NEEDS_QUOTES = re.compile(rb"[\"\\\x00-\x1f\x7f]")


def format_patch(changes: Iterable[Change]) -> bytes:
    """Return a unified diff as git writes it; each path is relative to the folder where the patch applies."""
    return b"".join(_format_file_patch(change) for change in changes)


def _find_patch_root(path: Path) -> Path:
    """Return the folder where a patch of a file applies: the top of its git work tree, else the current folder."""
    for folder in path.parents:
        if (folder / ".git").exists():
            return folder
    return Path.cwd() if path.is_relative_to(Path.cwd()) else path.parent


def _format_file_patch(change: Change) -> bytes:
    name = os.fsencode(change.path.relative_to(_find_patch_root(change.path)).as_posix())
    old, new = _quote_name(b"a/" + name), _quote_name(b"b/" + name)
    # In these lines git reads a file name with spaces up to a tab.
    end = b"\t\n" if b" " in name else b"\n"
    header = b"diff --git " + old + b" " + new + b"\n--- " + old + end + b"+++ " + new + end
    before, after = _LINES.findall(change.source.data), _LINES.findall(change.data)
    hunks = list(difflib.diff_bytes(difflib.unified_diff, before, after))[2:]
    return header + b"".join(map(_terminate_line, hunks))


def _quote_name(name: bytes) -> bytes:
    """Return a name as git writes it: quoted, with special characters in octal, if it has any."""
    if not _NEEDS_QUOTES.search(name):
        return name
    return b'"' + _NEEDS_QUOTES.sub(lambda match: b"\\%03o" % match[0][0], name) + b'"'


def _terminate_line(line: bytes) -> bytes:
    return line if line.endswith(b"\n") else line + b"\n\\ No newline at end of file\n"
