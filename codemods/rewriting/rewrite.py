"""One file's plan literals through their edits: only the named values and entries, every other byte as it was."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from codemods.files.sources import SourceFile, format_path
from codemods.reading.entries import PlanEntry
from codemods.reading.module import Module, PlanLiteral, iter_literals
from codemods.reading.parse import read_module
from plans.decompose import Edit, InsertEntry, SetStyle
from plans.errors import SourceError

__all__ = ["compute_edited_entries", "rewrite_source"]

_OPENING = re.compile(rb"[A-Za-z]*(\"\"\"|'''|\"|')")


@dataclass(frozen=True)
class _Splice:
    """A piece of a source's body replaced by other bytes.

    Args:
        start: where the piece begins.
        end: where it ends, exclusive; equal to `start` where something is only added.
        text: what stands there instead.
    """

    start: int
    end: int
    text: bytes


def rewrite_source(source: SourceFile, module: Module, edits: Sequence[tuple[PlanLiteral, tuple[Edit, ...]]]) -> bytes:
    """Return a file's bytes with the edits made in its plan literals.

    The result is parsed again: its plan literals must hold what the edits make of the old ones, nothing else.

    Args:
        source: the file.
        module: what it says of plans.
        edits: its plan literals with what is to change in each.

    Raises:
        SourceError: the result does not parse or holds anything else; a fault of ours.
    """
    body = source.body
    for splice in sorted(_build_splices(source, edits), key=lambda splice: splice.start, reverse=True):
        body = body[: splice.start] + splice.text + body[splice.end :]
    result = SourceFile(source.path, source.encode_body(body))
    wanted = {id(literal): changes for literal, changes in edits}
    expected = [compute_edited_entries(literal, wanted.get(id(literal), ())) for literal in iter_literals(module)]
    found = [[(entry.key, entry.style) for entry in literal.entries] for literal in iter_literals(read_module(result))]
    if found != expected:
        raise SourceError(
            f"{format_path(source.path)}: left alone, its rewrite would have changed more than the rules name",
            hint="report this file; nothing of its plans was written",
            path=str(source.path),
        )
    return result.data


def _build_splices(source: SourceFile, edits: Sequence[tuple[PlanLiteral, tuple[Edit, ...]]]) -> Iterator[_Splice]:
    """Yield the pieces of text that make the edits."""
    for literal, wanted in edits:
        for edit in wanted:
            for entry in literal.entries:
                if isinstance(edit, SetStyle) and _applies_to(edit, entry):
                    yield _Splice(*entry.style_span, _quote_like(source.body, entry.style_span[0], edit.style))
        for entry in literal.entries:
            inserted = [edit for edit in wanted if isinstance(edit, InsertEntry) and edit.anchor == entry.key]
            if inserted:
                yield _build_insertion(source.body, entry, inserted)


def _quote_like(body: bytes, start: int, value: str) -> bytes:
    opening = _OPENING.match(body, start)
    assert opening is not None
    return opening[1] + value.encode() + opening[1]


def _build_insertion(body: bytes, anchor: PlanEntry, edits: Sequence[InsertEntry]) -> _Splice:
    """Write entries just before their anchor: on lines of their own where the anchor begins one."""
    assert anchor.can_precede
    start, end = anchor.key_span
    line_start = max(body.rfind(b"\n", 0, start), body.rfind(b"\r", 0, start)) + 1
    indent = body[line_start:start]
    separator = _read_line_end(body, line_start) + indent if not indent.strip() else b" "
    key = body[start:end]
    quote = re.search(rb"(\"\"\"|'''|\"|')$", key)
    assert quote is not None
    text = b""
    for edit in edits:
        suffix = edit.key.removeprefix(edit.anchor).encode()
        style = _quote_like(body, anchor.style_span[0], edit.style)
        text += key[: quote.start()] + suffix + quote[0] + b": " + style + b"," + separator
    return _Splice(start, start, text)


def _read_line_end(body: bytes, line_start: int) -> bytes:
    """Return the line end that a line begins after."""
    before = body[max(0, line_start - 2) : line_start]
    return before if before == b"\r\n" else before[-1:]


def compute_edited_entries(literal: PlanLiteral, edits: Sequence[Edit]) -> list[tuple[str, str | None]]:
    """Return the entries that a literal must hold once its edits are made."""
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
