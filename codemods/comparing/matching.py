"""Entries matched between two revisions: those that moved, and the lines of text that a change touches."""

from __future__ import annotations

import ast
import difflib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from codemods.inheritance.effective import UNRESOLVED, EffectiveEntry, PlanBranch, PlanVariant

__all__ = ["diff_lines", "find_guard_lines", "is_obscured", "is_same_entry", "match_moved_entries"]


_Entries = Mapping[str, EffectiveEntry]


def match_moved_entries(
    old: Mapping[PlanVariant, _Entries], new: Mapping[PlanVariant, _Entries]
) -> dict[tuple[PlanVariant, str], PlanVariant | None]:
    """Pair entries of which only the function or the conditions differ.

    Args:
        old: a file's plans in the first revision.
        new: the file's plans in the second revision.

    Returns:
        For each moved entry of the second revision, by its variant and key, its variant in the first; for each moved
        entry of the first revision, None.
    """
    waiting: dict[tuple[object, ...], list[PlanVariant]] = defaultdict(list)
    for variant, key, entry in _find_unmatched(old, new):
        waiting[_build_match_key(variant, key, entry)].append(variant)
    moved: dict[tuple[PlanVariant, str], PlanVariant | None] = {}
    for variant, key, entry in _find_unmatched(new, old):
        if candidates := waiting[_build_match_key(variant, key, entry)]:
            origin = candidates.pop(0)
            moved |= {(variant, key): origin, (origin, key): None}
    return moved


def _find_unmatched(
    one: Mapping[PlanVariant, _Entries], other: Mapping[PlanVariant, _Entries]
) -> Iterator[tuple[PlanVariant, str, EffectiveEntry]]:
    """Yield the entries that only the first of two revisions has in their plan variant."""
    for variant, entries in one.items():
        yield from ((variant, key, entry) for key, entry in entries.items() if key not in other.get(variant, {}))


def _build_match_key(variant: PlanVariant, key: str, entry: EffectiveEntry) -> tuple[object, ...]:
    return variant.class_name, variant.branch[0], key, entry.style, entry.provenance, entry.path


def is_obscured(entries: tuple[_Entries, _Entries]) -> bool:
    """Return whether entries missing from one revision's plan may be in something that cannot be read there."""
    pair = entries[0].get(UNRESOLVED), entries[1].get(UNRESOLVED)
    return any(pair) and not is_same_entry(*pair)


def is_same_entry(one: EffectiveEntry | None, other: EffectiveEntry | None) -> bool:
    """Return whether both revisions write the same entry, wherever it is."""
    return one is not None and other is not None and (one.style, one.provenance) == (other.style, other.provenance)


def find_guard_lines(statements: Sequence[ast.stmt], line: int, branch: PlanBranch) -> frozenset[int]:
    """Return the lines of the function header and of the conditions that decide whether an entry applies.

    Args:
        statements: the statements of the file.
        line: the entry's line, counted from 1.
        branch: the plan, the function and the conditions.
    """
    _, function, conditions = branch
    lines: set[int] = set()
    scope: ast.AST = ast.Module(list(statements), [])
    for node in ast.walk(scope):
        if (
            isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            and _contains_line(node, line)
            and node.name == function
        ):
            lines.update(range(node.lineno, max(node.lineno + 1, node.body[0].lineno)))
            scope = node
    tests = {condition.test for condition in conditions}
    for node in ast.walk(scope):
        for test in _iter_tests(node, line):
            if isinstance(node, ast.Match) or ast.unparse(test) in tests:
                lines.update(range(test.lineno, (test.end_lineno or test.lineno) + 1))
    return frozenset(lines)


def _iter_tests(node: ast.AST, line: int) -> Iterator[ast.expr | ast.pattern]:
    match node:
        case ast.If(test=test) | ast.IfExp(test=test):
            yield test
        case ast.BoolOp(values=values):
            yield from values
        case ast.Match(subject=subject, cases=cases) if _contains_line(node, line):
            yield subject
            for case in cases:
                yield case.pattern
                yield from [case.guard] if case.guard else []


def _contains_line(node: ast.stmt, line: int) -> bool:
    return node.lineno <= line <= (node.end_lineno or node.lineno)


def diff_lines(before: bytes, after: bytes) -> tuple[frozenset[int], frozenset[int]]:
    """Return the lines that a text diff removes from `before` and those it adds to `after`, counted from 1."""
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
