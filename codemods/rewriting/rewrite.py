"""Edits made in one file's plan literals: only the named values and entries change, every other byte stays."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from codemods.files.sources import SourceFile, format_path
from codemods.reading.entries import PlanEntry
from codemods.reading.module import Module, PlanLiteral, iter_literals
from codemods.reading.parse import read_module
from plans.decompose import Edit, InsertEntry, SetStyle
from plans.errors import SourceError

if TYPE_CHECKING:
    from codemods.rewriting.transformers import PlanEdit

__all__ = ["LiteralEdits", "build_plan_edits", "check_rewritten", "compute_edited_entries", "rewrite_source"]

LiteralEdits = Sequence[tuple[PlanLiteral, tuple[Edit, ...]]]
"""Plan literals of one file, each with what is to change in it."""

_Span = tuple[int, int]


def rewrite_source(source: SourceFile, module: Module, edits: LiteralEdits) -> bytes:
    """Return a file's bytes with the edits made in its plan literals.

    LibCST parses and writes only the expressions that are edited; the result is then read again and checked.

    Args:
        source: the file.
        module: what was read of the file.
        edits: its plan literals with what is to change in each.

    Raises:
        SourceError: LibCST cannot reproduce an expression, or the result differs from what the edits ask for.
    """
    if not any(changes for _, changes in edits):
        return source.data
    body = source.body
    for (start, end), changes in sorted(_group_by_expression(edits).items(), reverse=True):
        body = body[:start] + _edit_expression(source, start, end, changes) + body[end:]
    data = source.encode_body(body)
    check_rewritten(source, module, edits, data)
    return data


def check_rewritten(source: SourceFile, module: Module, edits: LiteralEdits, data: bytes) -> None:
    """Parse a rewritten file again: its literals must hold what the edits make of the old ones, and nothing else.

    Args:
        source: the file as it was.
        module: what was read of it.
        edits: its plan literals with what was to change in each.
        data: the rewritten file.

    Raises:
        SourceError: the result does not parse or its entries differ; a bug of ours.
    """
    changes_of = {id(literal): changes for literal, changes in edits}
    expected = [compute_edited_entries(literal, changes_of.get(id(literal), ())) for literal in iter_literals(module)]
    rewritten = read_module(SourceFile(source.path, data))
    if [[(entry.key, entry.style) for entry in literal.entries] for literal in iter_literals(rewritten)] != expected:
        raise SourceError(
            f"{format_path(source.path)}: not rewritten, because more would change than the rules ask for",
            hint="report this file as a bug of migrator; it was left as it is",
            path=str(source.path),
        )


def build_plan_edits(literal: PlanLiteral, edits: Sequence[Edit]) -> Iterator[tuple[PlanEntry, PlanEdit]]:
    """Yield the edits of a literal as LibCST edits, each with the entry that it stands at.

    Args:
        literal: a plan literal.
        edits: what is to change in it.
    """
    from codemods.rewriting.transformers import InsertBefore, ReplaceStyle

    for entry in literal.entries:
        for edit in edits:
            if isinstance(edit, InsertEntry) and edit.anchor == entry.key:
                yield entry, InsertBefore(entry.key_span, edit.key.removeprefix(edit.anchor), edit.style)
            elif isinstance(edit, SetStyle) and _applies_to(edit, entry):
                yield entry, ReplaceStyle(entry.style_span, edit.style)


def compute_edited_entries(literal: PlanLiteral, edits: Sequence[Edit]) -> list[tuple[str, str | None]]:
    """Return the entries, key and style, that a literal must hold once its edits are made."""
    result: list[tuple[str, str | None]] = []
    for entry in literal.entries:
        result += [
            (edit.key, edit.style) for edit in edits if isinstance(edit, InsertEntry) and edit.anchor == entry.key
        ]
        changed = [edit.style for edit in edits if isinstance(edit, SetStyle) and _applies_to(edit, entry)]
        result.append((entry.key, changed[0] if changed else entry.style))
    return result


def _applies_to(edit: SetStyle, entry: PlanEntry) -> bool:
    return (edit.key, edit.before) == (entry.key, entry.style)


def _group_by_expression(edits: LiteralEdits) -> Mapping[_Span, list[PlanEdit]]:
    """Group edits by the outermost expression that one of them stands in: a plan may hold another plan's display."""
    located = [pair for literal, changes in edits for pair in build_plan_edits(literal, changes)]
    groups: dict[_Span, list[PlanEdit]] = {}
    outer = (0, 0)
    for entry, edit in sorted(located, key=lambda pair: (pair[0].expression_span[0], -pair[0].expression_span[1])):
        if entry.expression_span[1] > outer[1]:
            outer = entry.expression_span
        groups.setdefault(outer, []).append(edit)
    return groups


def _edit_expression(source: SourceFile, start: int, end: int, edits: Sequence[PlanEdit]) -> bytes:
    """Return the text of an expression of a file, with its edits made by LibCST."""
    from dataclasses import replace

    from codemods.rewriting.transformers import edit_expression

    local = [replace(edit, span=(edit.span[0] - start, edit.span[1] - start)) for edit in edits]
    try:
        return edit_expression(source.body[start:end].decode(), local).encode()
    except (ValueError, RecursionError) as error:
        line = source.body.count(b"\n", 0, start) + 1
        raise SourceError(
            f"{format_path(source.path)}:{line}: not rewritten, because LibCST cannot edit this plan: {error}",
            hint="write the plan's keys and styles as plain strings, or change them by hand",
            path=str(source.path),
            line=line,
        ) from error
