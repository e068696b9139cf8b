"""One file's plan literals through their edits: LibCST on each assignment alone, every other byte as it was."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import libcst as cst

from codemods.literals import PlanLiteral, read_statement
from codemods.sources import Source
from plans.decompose import Edit, InsertEntry, SetStyle, apply_edits

__all__ = ["rewrite_source", "rewrite_statement"]


def rewrite_source(source: Source, edits: Sequence[tuple[PlanLiteral, tuple[Edit, ...]]]) -> bytes:
    """Return a file's bytes with the edits made in its plan literals.

    Each new statement is parsed again, and must assign what the edits make of the old plan, nothing else.

    Args:
        source: the file.
        edits: plan literals of this file, each with what is to change in it.
    """
    body = source.body
    for literal, wanted in sorted(edits, key=lambda row: row[0].start, reverse=True):
        statement = rewrite_statement(body[literal.start : literal.end].decode(), wanted)
        expected = apply_edits(literal.plan, wanted)
        result = read_statement(statement)
        assert result is not None
        assert list(result.items()) == list(expected.items()), f"{source.path}:{literal.line}: edited beyond its rules"
        body = body[: literal.start] + statement.encode() + body[literal.end :]
    return source.with_body(body)


def rewrite_statement(text: str, edits: Sequence[Edit]) -> str:
    """Return an assignment's text with the edits made in its dict display; comments, quotes and layout stay.

    Args:
        text: one statement without its indentation, `base_model_tp_plan = {…}`.
        edits: for keys that the display holds as string constants.
    """
    newline = next((found for found in ("\r\n", "\r") if found in text), "\n")
    line = cst.parse_statement(text, cst.PartialParserConfig(default_newline=newline))
    assert isinstance(line, cst.SimpleStatementLine)
    assignment = line.body[0]
    assert isinstance(assignment, (cst.Assign, cst.AnnAssign))
    assert isinstance(assignment.value, cst.Dict)
    plan = assignment.value.with_changes(elements=list(_edited(assignment.value.elements, edits)))
    edited = line.with_changes(body=[assignment.with_changes(value=plan), *line.body[1:]])
    return cst.Module(body=[edited], default_newline=newline).code.removesuffix(newline)


def _edited(elements: Sequence[cst.BaseDictElement], edits: Sequence[Edit]) -> Iterator[cst.BaseDictElement]:
    styles = {edit.key: edit for edit in edits if isinstance(edit, SetStyle)}
    inserts = [edit for edit in edits if isinstance(edit, InsertEntry)]
    comma = _separator(elements)
    for element in elements:
        key = _constant(element.key) if isinstance(element, cst.DictElement) else None
        yield from (_entry_like(element, edit, comma) for edit in inserts if edit.anchor == key)
        wanted = styles.get(key) if key is not None else None
        if wanted is not None and _constant(element.value) == wanted.before:
            yield element.with_changes(value=_quoted_like(element.value, wanted.style))
        else:
            yield element


def _constant(node: cst.BaseExpression) -> str | None:
    value = node.evaluated_value if isinstance(node, (cst.SimpleString, cst.ConcatenatedString)) else None
    return value if isinstance(value, str) else None


def _quoted_like(node: cst.BaseExpression, value: str) -> cst.SimpleString:
    quote = node.quote if isinstance(node, cst.SimpleString) else '"'
    return cst.SimpleString(f"{quote}{value}{quote}")


def _entry_like(neighbour: cst.BaseDictElement, edit: InsertEntry, comma: cst.Comma) -> cst.DictElement:
    assert isinstance(neighbour, cst.DictElement)
    return neighbour.with_changes(
        key=_quoted_like(neighbour.key, edit.key), value=_quoted_like(neighbour.value, edit.style), comma=comma
    )


def _separator(elements: Sequence[cst.BaseDictElement]) -> cst.Comma:
    """Return the comma that divides entries in this display: its own line breaks and indentation, no comments."""
    for element in elements:
        if isinstance(element.comma, cst.Comma):
            whitespace = element.comma.whitespace_after
            if isinstance(whitespace, cst.ParenthesizedWhitespace):
                line_break = whitespace.first_line.with_changes(comment=None, whitespace=cst.SimpleWhitespace(""))
                whitespace = whitespace.with_changes(first_line=line_break, empty_lines=[])
            return element.comma.with_changes(whitespace_after=whitespace)
    return cst.Comma(whitespace_after=cst.SimpleWhitespace(" "))
