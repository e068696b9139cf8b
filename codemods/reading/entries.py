"""Plan entries in an expression: in dict displays, comprehensions, pairs and items, with their offsets in the text."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeGuard

__all__ = [
    "OffsetReader",
    "PlanEntry",
    "can_hold_entries",
    "find_computed_modules",
    "find_placeholder",
    "find_unreadable_keys",
    "is_numbered",
    "read_entries",
    "read_key",
    "span",
]

OffsetReader = Callable[[int, int], int]
"""Maps a line, counted from 1, and a column in UTF-8 bytes to an offset in the text."""

_COMPUTED = "\0"
_LAYER_NUMBER = re.compile(r"(?:^|\.)\d+(?:\.|$)|(?:layers?|blocks?|h)\.\0(?:\.|$)")
_PLACEHOLDER = re.compile(r"[{}%$]")  # in no key and in no style
_REPLACEMENT_FIELD = re.compile(r"\{[^{}]*\}")


@dataclass(frozen=True)
class PlanEntry:
    """One `key: style`.

    Args:
        key: the plan key, with a wildcard for each computed part, as in `f"layers.{i}.mlp"`.
        style: the name of the style, None if it is computed.
        line: the line of the style, counted from 1.
        key_span: the start and the end of the key in the text.
        style_span: the start and the end of the style in the text.
        expression_span: the start and the end of the expression that an edit of this entry changes: the dict display,
            call or list of pairs that writes it; for `plan[key] = style`, and for one style of several keys, the style.
        can_precede: whether another entry, whose key is derived from this one's, can be inserted before this one.
        computed: whether a part of the key is computed.
        numbered: whether the key names one layer by its number, literal or computed.
        replaceable: whether the style can be replaced: it belongs to no other entry, and nothing after it may override
            it.
    """

    key: str
    style: str | None
    line: int
    key_span: tuple[int, int]
    style_span: tuple[int, int]
    expression_span: tuple[int, int]
    can_precede: bool
    computed: bool = False
    numbered: bool = False
    replaceable: bool = True


def read_entries(nodes: Iterable[ast.AST], offset: OffsetReader) -> tuple[PlanEntry, ...]:
    """Return the entries that some nodes write, in the order of the text.

    Args:
        nodes: displays, comprehensions, lists of pairs, calls, or item assignments, `plan[key] = style`.
        offset: returns offsets in the text that the nodes were parsed from.
    """
    return tuple(
        sorted((entry for node in nodes for entry in _iter_entries(node, offset)), key=lambda entry: entry.key_span)
    )


def can_hold_entries(node: ast.AST) -> bool:
    """Return whether a node is of a kind that writes entries itself."""
    return isinstance(node, ast.Dict) or next(_iter_pairs(node), None) is not None


def find_placeholder(node: ast.AST) -> str | None:
    """Return the first key or style of a node that is text which something else fills in, as `experts.{{ name }}`."""
    texts = (part.value for pair in _iter_pairs(node) for part in (pair.key, pair.style) if _is_constant(part))
    return next((text for text in texts if isinstance(text, str) and _PLACEHOLDER.search(text)), None)


def find_unreadable_keys(node: ast.AST) -> list[ast.expr | ast.keyword]:
    """Return the keys of a node that cannot be read as text: names, or strings whose last part is computed."""
    return [pair.key for pair in _iter_pairs(node) if _is_unreadable(pair)]


def find_computed_modules(node: ast.AST, parameters: Iterable[str]) -> Iterator[ast.expr]:
    """Yield the computed part of each key of a node in which it stands for the module of one of some parameters."""
    endings = tuple(f"{_COMPUTED}.{parameter}" for parameter in parameters)
    for pair in _iter_pairs(node):
        text = _read_text(pair.key)
        if text is not None and text.endswith(endings) and not is_numbered(text):
            parts = [part for part in ast.walk(pair.key) if isinstance(part, ast.expr) and _read_text(part) is None]
            yield next((part for part in reversed(parts) if isinstance(part, ast.Name)), pair.style)


def read_key(node: ast.expr) -> str | None:
    """Return the key that an expression writes, computed parts as wildcards, or None if it is not a string."""
    text = _read_text(node)
    return None if text is None else text.replace(_COMPUTED, "*")


def is_numbered(key: str) -> bool:
    """Return whether a key names one layer by its number."""
    return _LAYER_NUMBER.search(key) is not None


def span(node: ast.AST, offset: OffsetReader) -> tuple[int, int]:
    """Return the start and the end of an expression or a statement in the text."""
    assert isinstance(node, (ast.expr, ast.stmt, ast.keyword))
    assert node.end_lineno is not None
    assert node.end_col_offset is not None
    return offset(node.lineno, node.col_offset), offset(node.end_lineno, node.end_col_offset)


@dataclass(frozen=True)
class _Pair:
    """A key with its style.

    Args:
        key: the key.
        style: the style.
        expression: the expression that contains both, or the style if the key is not next to it.
        has_own_style: whether no other key shares the style node.
    """

    key: ast.expr | ast.keyword
    style: ast.expr
    expression: ast.expr
    has_own_style: bool = True

    @property
    def in_display(self) -> bool:
        """Whether both are in a dict display."""
        return isinstance(self.expression, ast.Dict) and self.expression is not self.style


def _iter_pairs(node: ast.AST) -> Iterator[_Pair]:
    match node:
        case ast.Dict(keys=keys, values=values):
            for key, value in zip(keys, values, strict=True):
                if key is not None:
                    yield _Pair(key, value, node)
        case ast.DictComp():
            yield from _iter_comprehension(node)
        case ast.List(elts=[_, *_] as elements) | ast.Tuple(elts=[_, *_] as elements) if all(map(_is_pair, elements)):
            yield from (_Pair(pair.elts[0], pair.elts[1], node) for pair in elements if _is_pair(pair))
        case ast.Call(func=ast.Attribute(attr="fromkeys"), args=[keys, value]):
            yield from _pair_with_style(_get_elements(keys), value)
        case ast.Call(func=ast.Attribute(attr="setdefault" | "__setitem__"), args=[key, value]):
            yield _Pair(key, value, node)
        case ast.Call(func=ast.Name(id="dict") | ast.Attribute(attr="update"), keywords=keywords):
            yield from (_Pair(keyword, keyword.value, node) for keyword in keywords if keyword.arg)
        case ast.Assign(targets=[ast.Subscript(slice=key)], value=value):
            yield _Pair(key, value, value)


def _iter_comprehension(node: ast.DictComp) -> Iterator[_Pair]:
    """Yield the pairs of a comprehension: one for each key or pair that it lists, or one with its computed key."""
    match node:
        case ast.DictComp(
            key=ast.Name(id=key), generators=[ast.comprehension(target=ast.Name(id=name), iter=keys)]
        ) if key == name and _get_elements(keys):
            yield from _pair_with_style(_get_elements(keys), node.value)
        case ast.DictComp(
            key=ast.Name(id=key),
            value=ast.Name(id=value),
            generators=[
                ast.comprehension(target=ast.Tuple(elts=[ast.Name(id=first), ast.Name(id=second)]), iter=pairs)
            ],
        ) if (key, value) == (first, second) and _get_elements(pairs):
            yield from _iter_pairs(pairs)
        case _:
            yield _Pair(node.key, node.value, node.value)


def _is_constant(node: ast.expr | ast.keyword) -> TypeGuard[ast.Constant]:
    return isinstance(node, ast.Constant)


def _get_elements(node: ast.expr) -> list[ast.expr]:
    return node.elts if isinstance(node, (ast.List, ast.Tuple, ast.Set)) else []


def _pair_with_style(keys: list[ast.expr], style: ast.expr) -> Iterator[_Pair]:
    return (_Pair(key, style, style, has_own_style=len(keys) == 1) for key in keys)


def _is_pair(node: ast.expr) -> TypeGuard[ast.Tuple | ast.List]:
    return isinstance(node, (ast.Tuple, ast.List)) and len(node.elts) == 2


def _iter_entries(node: ast.AST, offset: OffsetReader) -> Iterator[PlanEntry]:
    for pair in _iter_pairs(node):
        text = _read_text(pair.key)
        style = pair.style.value if isinstance(pair.style, ast.Constant) else None
        if text is not None and (style is None or isinstance(style, str)):
            yield PlanEntry(
                text.replace(_COMPUTED, "*"),
                style,
                pair.style.lineno,
                span(pair.key, offset),
                span(pair.style, offset),
                span(pair.expression, offset),
                can_precede=pair.in_display and isinstance(pair.key, (ast.Constant, ast.JoinedStr)),
                computed=_COMPUTED in text,
                numbered=is_numbered(text),
                replaceable=pair.has_own_style,
            )


def _is_unreadable(pair: _Pair) -> bool:
    text = _read_text(pair.key)
    return text is None or text.endswith(_COMPUTED)


def _read_text(node: ast.expr | ast.keyword) -> str | None:
    """Return the text of a string expression with a mark for each computed part, or None if it is not a string."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.keyword(arg=name):
            return name
        case ast.JoinedStr(values=parts):
            return "".join(_read_text(part) or _COMPUTED for part in parts)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            texts = _read_text(left), _read_text(right)
            return None if texts == (None, None) else "".join(text or _COMPUTED for text in texts)
        case ast.Call(func=ast.Attribute(value=ast.Constant(value=str(text)), attr="format")):
            return _REPLACEMENT_FIELD.sub(_COMPUTED, text)
    return None
