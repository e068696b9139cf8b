"""Plan entries in an expression: dict displays, comprehensions, pairs and items, with their places in the text."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeGuard

__all__ = ["Entry", "Offset", "is_numbered", "read_entries"]

Offset = Callable[[int, int], int]
"""From a line counted from 1 and a column in UTF-8 bytes to a place in the text."""

_COMPUTED = "\0"
_LAYER_NUMBER = re.compile(r"(?:^|\.)\d+(?:\.|$)|(?:layers?|blocks?|h)\.\0(?:\.|$)")
_REPLACEMENT_FIELD = re.compile(r"\{[^{}]*\}")


@dataclass(frozen=True)
class Entry:
    """One `key: style`.

    Args:
        key: the plan key; what is computed in it, as in `f"layers.{i}.mlp"`, is a wildcard.
        style: the style name, None where it is computed.
        line: where the style stands, counted from 1.
        key_span: where the key stands in the text.
        style_span: where the style stands in the text.
        can_precede: whether another entry can be written just before this one, its key formed from this one's.
        computed: whether a part of the key is computed.
        numbered: whether the key names one layer by its number, written out or computed.
    """

    key: str
    style: str | None
    line: int
    key_span: tuple[int, int]
    style_span: tuple[int, int]
    can_precede: bool
    computed: bool = False
    numbered: bool = False


def read_entries(node: ast.AST, offset: Offset) -> tuple[Entry, ...]:
    """Return every entry that an expression or statement writes down, in the order of the text.

    Args:
        node: an expression; or an item assignment, `plan[key] = style`.
        offset: finds places in the text that the node was parsed from.
    """
    found = [entry for part in ast.walk(node) for entry in _entries_of(part, offset)]
    return tuple(sorted(found, key=lambda entry: entry.key_span))


def is_numbered(key: str) -> bool:
    """Say whether a key names one layer by its number."""
    return _LAYER_NUMBER.search(key) is not None


def _entries_of(node: ast.AST, offset: Offset) -> Iterator[Entry]:
    match node:
        case ast.Dict(keys=keys, values=values):
            yield from _entries(zip(keys, values, strict=True), offset, in_display=True)
        case ast.DictComp(key=key, value=value):
            yield from _entries([(key, value)], offset)
        case ast.Call(func=ast.Name(id="dict"), args=[ast.List(elts=pairs) | ast.Tuple(elts=pairs), *_]):
            yield from _entries((pair.elts for pair in pairs if _is_pair(pair)), offset)
        case ast.Call(func=ast.Attribute(attr="setdefault"), args=[key, value]):
            yield from _entries([(key, value)], offset)
        case ast.Assign(targets=[ast.Subscript(slice=key)], value=value):
            yield from _entries([(key, value)], offset)


def _is_pair(node: ast.expr) -> TypeGuard[ast.Tuple | ast.List]:
    return isinstance(node, (ast.Tuple, ast.List)) and len(node.elts) == 2


def _entries(
    pairs: Iterable[Iterable[ast.expr | None]], offset: Offset, *, in_display: bool = False
) -> Iterator[Entry]:
    for key_node, style_node in pairs:
        text = _text(key_node) if key_node is not None else None
        if text is None or key_node is None or style_node is None:
            continue
        style = style_node.value if isinstance(style_node, ast.Constant) else None
        if style is None or isinstance(style, str):
            yield Entry(
                text.replace(_COMPUTED, "*"),
                style,
                style_node.lineno,
                _span(key_node, offset),
                _span(style_node, offset),
                can_precede=in_display and isinstance(key_node, (ast.Constant, ast.JoinedStr)),
                computed=_COMPUTED in text,
                numbered=is_numbered(text),
            )


def _text(node: ast.expr) -> str | None:
    """Return a string expression's text with marks for what is computed, None for what is no string at all."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(_text(part) or _COMPUTED for part in parts)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            pieces = _text(left), _text(right)
            return None if pieces == (None, None) else "".join(piece or _COMPUTED for piece in pieces)
        case ast.Call(func=ast.Attribute(value=ast.Constant(value=str(text)), attr="format")):
            return _REPLACEMENT_FIELD.sub(_COMPUTED, text)
    return None


def _span(node: ast.expr, offset: Offset) -> tuple[int, int]:
    assert node.end_lineno is not None
    assert node.end_col_offset is not None
    return offset(node.lineno, node.col_offset), offset(node.end_lineno, node.end_col_offset)
