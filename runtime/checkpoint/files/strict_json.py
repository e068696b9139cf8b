"""JSON read without trust: no key twice, no half characters, and no more parts than memory has room for."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from plans.errors import HeaderError

__all__ = ["is_nested_deeper", "is_size", "parse_strict_json"]

_MAX_SIZE = 2**63 - 1
_MAX_PARSED = 2**29
_HINT = "the file is damaged or was not written by safetensors; download or save it again"


def parse_strict_json(text: bytes, file: Path) -> dict[str, object]:
    """Parse a JSON object in which no key occurs twice and every string is valid Unicode.

    Raises:
        HeaderError: the text is anything else.
    """

    def build_unique_dict(pairs: Sequence[tuple[str, object]]) -> dict[str, object]:
        if len(result := dict(pairs)) != len(pairs):
            raise ValueError("a key occurs twice")
        return result

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    if _estimate_parsed_bytes(text) > _MAX_PARSED:
        raise HeaderError(f"{file}: JSON of more parts than any checkpoint's", hint=_HINT, file=str(file))
    try:
        value = json.loads(text, object_pairs_hook=build_unique_dict, parse_constant=refuse)
        if b"\\u" in text:
            # Only escapes can smuggle in half a surrogate pair, which no file could be written with.
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise HeaderError(f"{file}: not valid JSON: {error}", hint=_HINT, file=str(file)) from error
    if not isinstance(value, dict):
        raise HeaderError(f"{file}: JSON is not an object", hint=_HINT, file=str(file))
    return value


def is_size(value: object, limit: int = _MAX_SIZE) -> bool:
    """Return whether a parsed value is an integer from 0 to a limit; Booleans are not integers."""
    return type(value) is int and 0 <= value <= limit


def is_nested_deeper(value: object, levels: int) -> bool:
    """Return whether lists and tables lie in one another over more than so many levels."""
    inside = [value]
    for _ in range(levels):
        inside = [part for one in inside if isinstance(one, dict | list) for part in _get_children(one)]
    return any(isinstance(one, dict | list) for one in inside)


def _get_children(value: dict[str, object] | list[object]) -> Iterable[object]:
    return value.values() if isinstance(value, dict) else value


def _estimate_parsed_bytes(text: bytes) -> int:
    """Return about what JSON takes in memory: its lists and tables, its strings and the pairs of them, its numbers."""
    return 96 * (text.count(b"[") + text.count(b"{")) + 112 * (text.count(b'"') // 2) + 48 * text.count(b",")
