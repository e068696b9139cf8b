"""The lines that a text diff touches."""

from __future__ import annotations

import difflib

__all__ = ["diff_lines"]


def diff_lines(before: bytes, after: bytes) -> tuple[frozenset[int], frozenset[int]]:
    """Return the lines that a text diff removes from `before` and those that it adds to `after`, counted from 1."""
    old, new = before.splitlines(), after.splitlines()
    start = 0
    while start < min(len(old), len(new)) and old[start] == new[start]:
        start += 1
    end = 0
    while end < min(len(old), len(new)) - start and old[-1 - end] == new[-1 - end]:
        end += 1
    matcher = difflib.SequenceMatcher(None, old[start : len(old) - end], new[start : len(new) - end], autojunk=False)
    removed: set[int] = set()
    added: set[int] = set()
    for tag, old_start, old_end, new_start, new_end in matcher.get_opcodes():
        if tag != "equal":
            removed.update(range(start + old_start + 1, start + old_end + 1))
            added.update(range(start + new_start + 1, start + new_end + 1))
    return frozenset(removed), frozenset(added)
