"""Changes as a patch that `git apply` takes."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable

from codemods.migrate import Change

__all__ = ["patch"]

_LINES = re.compile(rb"[^\n]*\n|[^\n]+")


def patch(changes: Iterable[Change]) -> bytes:
    """Return a unified diff with paths relative to the current folder."""
    return b"".join(_file_patch(change) for change in changes)


def _file_patch(change: Change) -> bytes:
    name = os.fsencode(os.path.relpath(change.path).replace(os.sep, "/"))
    # git reads a file name with spaces up to a tab
    end = b"\t\n" if b" " in name else b"\n"
    header = b"diff --git a/" + name + b" b/" + name + b"\n--- a/" + name + end + b"+++ b/" + name + end
    before, after = _LINES.findall(change.source.data), _LINES.findall(change.data)
    hunks = list(difflib.diff_bytes(difflib.unified_diff, before, after))[2:]
    return header + b"".join(
        line if line.endswith(b"\n") else line + b"\n\\ No newline at end of file\n" for line in hunks
    )
