"""Parse JSON of untrusted files: no duplicate keys, no broken Unicode, and bounded memory.

`json.loads` accepts all of these. A header with a key twice, for one, is read differently by different readers.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from plans.errors import HeaderError

__all__ = ["MAX_SIZE", "is_nested_deeper", "is_size", "parse_strict_json"]

MAX_SIZE = 2**63 - 1
"""The largest size or offset that any format can hold."""

_MAX_PARSED_BYTES = 2**29
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

    if _estimate_parsed_bytes(text) > _MAX_PARSED_BYTES:
        raise HeaderError(f"{file}: JSON with more values than any checkpoint has", hint=_HINT, file=str(file))
    try:
        value = json.loads(text, object_pairs_hook=build_unique_dict, parse_constant=refuse)
        if b"\\u" in text:
            # Only an escape can produce half a surrogate pair, which no file name or output could be encoded with.
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise HeaderError(f"{file}: not valid JSON: {error}", hint=_HINT, file=str(file)) from error
    if not isinstance(value, dict):
        raise HeaderError(f"{file}: JSON is not an object", hint=_HINT, file=str(file))
    return value


def is_size(value: object, limit: int = MAX_SIZE) -> bool:
    """Return whether a parsed value is an integer from 0 to `limit`, and not a bool."""
    return type(value) is int and 0 <= value <= limit


def is_nested_deeper(value: object, levels: int) -> bool:
    """Return whether lists and objects are nested more than `levels` deep."""
    values = [value]
    for _ in range(levels):
        values = [child for value in values if isinstance(value, dict | list) for child in _get_children(value)]
    return any(isinstance(value, dict | list) for value in values)


def _get_children(value: dict[str, object] | list[object]) -> Iterable[object]:
    return value.values() if isinstance(value, dict) else value


def _estimate_parsed_bytes(text: bytes) -> int:
    """Return roughly the memory that parsed JSON takes: its containers, its strings and their pairs, its numbers."""
    return 96 * (text.count(b"[") + text.count(b"{")) + 112 * (text.count(b'"') // 2) + 48 * text.count(b",")
