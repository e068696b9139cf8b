"""Edits of plans as a LibCST transformer.

The transformer receives typed edits and never text to splice in: quotes, parentheses, whitespace, comments and line
ends come from the nodes around an edit. `rewrite` runs it over the one expression that an edit stands in, the LibCST
command over a whole module. Importing LibCST takes longer than reading most trees, so this module is imported only
once there is something to edit.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import libcst as cst
from libcst.metadata import ByteSpanPositionProvider, MetadataWrapper

__all__ = ["InsertBefore", "PlanEdit", "PlanTransformer", "ReplaceStyle", "edit_expression"]

_LINE_END = re.compile(r"\r\n?|\n")


@dataclass(frozen=True)
class ReplaceStyle:
    """Write another style for the one that stands at a span.

    Args:
        span: the old style's string: its first byte and the byte after its last, in the module's UTF-8 text.
        style: the new style.
    """

    span: tuple[int, int]
    style: str


@dataclass(frozen=True)
class InsertBefore:
    """Write an entry before the one whose key stands at a span.

    Args:
        span: the other entry's key: its first byte and the byte after its last, in the module's UTF-8 text.
        suffix: what the new key adds to the other one's.
        style: the new entry's style.
    """

    span: tuple[int, int]
    suffix: str
    style: str


PlanEdit = ReplaceStyle | InsertBefore

_String = TypeVar("_String", cst.SimpleString, cst.ConcatenatedString)


class PlanTransformer(cst.CSTTransformer):
    """Makes typed edits in a module's plans and leaves every other byte as it is.

    Args:
        edits: the edits; several entries before one key are written in the order given.
    """

    METADATA_DEPENDENCIES = (ByteSpanPositionProvider,)

    def __init__(self, edits: Sequence[PlanEdit]) -> None:
        super().__init__()
        self._styles = {edit.span: edit.style for edit in edits if isinstance(edit, ReplaceStyle)}
        self._insertions: dict[tuple[int, int], list[InsertBefore]] = defaultdict(list)
        for edit in edits:
            if isinstance(edit, InsertBefore):
                self._insertions[edit.span].append(edit)

    def leave_SimpleString(  # noqa: N802 - LibCST's name
        self, original_node: cst.SimpleString, updated_node: cst.SimpleString
    ) -> cst.BaseExpression:
        """Replace a style that is one string."""
        return self._replace_style(original_node, updated_node)

    def leave_ConcatenatedString(  # noqa: N802 - LibCST's name
        self, original_node: cst.ConcatenatedString, updated_node: cst.ConcatenatedString
    ) -> cst.BaseExpression:
        """Replace a style that is written in several strings."""
        return self._replace_style(original_node, updated_node)

    def leave_Dict(self, original_node: cst.Dict, updated_node: cst.Dict) -> cst.Dict:  # noqa: N802 - LibCST's name
        """Insert new entries before their anchors."""
        if not self._insertions:
            return updated_node
        elements: list[cst.BaseDictElement] = []
        whitespace = updated_node.lbrace.whitespace_after
        for original, element in zip(original_node.elements, updated_node.elements, strict=True):
            if isinstance(original, cst.DictElement) and isinstance(element, cst.DictElement):
                for edit in self._insertions.get(self._find_span(original.key), ()):
                    elements.append(_build_element(element, edit, whitespace))
            elements.append(element)
            if isinstance(element.comma, cst.Comma):
                whitespace = element.comma.whitespace_after
        return updated_node.with_changes(elements=elements)

    def _replace_style(self, original: cst.BaseExpression, updated: _String) -> cst.BaseExpression:
        style = self._styles.get(self._find_span(original))
        if style is None:
            return updated
        return replace(_build_string(style, updated), lpar=updated.lpar, rpar=updated.rpar)

    def _find_span(self, node: cst.CSTNode) -> tuple[int, int]:
        span = self.get_metadata(ByteSpanPositionProvider, node)
        return span.start, span.start + span.length


def edit_expression(text: str, edits: Sequence[PlanEdit]) -> str:
    """Return an expression's text with edits made.

    Args:
        text: the expression, without the parentheses around it.
        edits: the edits, with their spans counted from the start of the text.

    Raises:
        ValueError: LibCST cannot parse the expression, or does not write it back as it was.
    """
    # A string over several lines is an expression only in parentheses.
    enclosed = f"({text})"
    try:
        expression = cst.parse_expression(enclosed)
    except cst.ParserSyntaxError as error:
        raise ValueError(error.message) from error
    # The parser takes the first line end of what it parses for the default, whatever the file uses elsewhere.
    line_end = _LINE_END.search(text)
    statement = cst.SimpleStatementLine([cst.Expr(expression)])
    module = cst.Module([statement], default_newline=line_end[0] if line_end else "\n", has_trailing_newline=False)
    if module.code != enclosed:
        raise ValueError("its text is not what LibCST writes for it")
    shifted = [replace(edit, span=(edit.span[0] + 1, edit.span[1] + 1)) for edit in edits]
    return MetadataWrapper(module, unsafe_skip_copy=True).visit(PlanTransformer(shifted)).code[1:-1]


def _build_element(
    anchor: cst.DictElement, edit: InsertBefore, whitespace: cst.BaseParenthesizableWhitespace
) -> cst.DictElement:
    """Return the entry to write before an anchor that stands after some whitespace."""
    return cst.DictElement(
        _append(anchor.key.deep_clone(), edit.suffix),
        _build_string(edit.style, anchor.value),
        comma=cst.Comma(whitespace_after=_build_separator(whitespace)),
    )


def _build_separator(whitespace: cst.BaseParenthesizableWhitespace) -> cst.BaseParenthesizableWhitespace:
    """Return what to write between two entries that both stand as the second does: on a line of its own or not."""
    if isinstance(whitespace, cst.ParenthesizedWhitespace):
        before = whitespace.empty_lines[-1] if whitespace.empty_lines else whitespace.first_line
        return whitespace.with_changes(
            first_line=cst.TrailingWhitespace(newline=before.newline.deep_clone()),
            empty_lines=(),
            last_line=whitespace.last_line.deep_clone(),
        )
    is_continued = isinstance(whitespace, cst.SimpleWhitespace) and "\\" in whitespace.value
    return whitespace.deep_clone() if is_continued else cst.SimpleWhitespace(" ")


def _append(key: cst.BaseExpression, suffix: str) -> cst.BaseExpression:
    """Return a string expression with text added before its last quote."""
    match key:
        case cst.SimpleString(value=value):
            end = len(value) - len(key.quote)
            return key.with_changes(value=value[:end] + suffix + value[end:])
        case cst.FormattedString(parts=parts):
            return key.with_changes(parts=(*parts, cst.FormattedStringText(suffix)))
        case cst.ConcatenatedString(right=right):
            return key.with_changes(right=_append(right, suffix))
    raise ValueError("a key is not written as a string")


def _build_string(text: str, model: cst.BaseExpression) -> cst.SimpleString:
    """Return a string in the quotes that another one begins with."""
    while isinstance(model, cst.ConcatenatedString):
        model = model.left
    match model:
        case cst.SimpleString(quote=quote) | cst.FormattedString(end=quote):
            return cst.SimpleString(f"{quote}{text}{quote}")
    raise ValueError("a style is not written as a string")
