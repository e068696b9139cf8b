"""Classes by the names that they inherit from, by their headers alone: a quick first look, never the last word."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from codemods.sources import Source
from plans.errors import SourceError

__all__ = ["heirs_by_name", "importers_by_folder"]

_HEADER = re.compile(rb"\nclass (\w+)[ \t]*(?:\(([^)]*)\))?")
_NAME = re.compile(rb"\w+")
_ALIAS = re.compile(rb" as (\w+)")
_SECOND_NAME = re.compile(rb"\n(\w+) = (\w+)[ \t]*(?=\n)")
_MODULE = re.compile(rb"\n[ \t]*from[ \t]+([\w.]*\.[\w.]*)[ \t]+import\b")
_LONGEST = 80  # bytes before an alias in which the name is looked for


def heirs_by_name(sources: Iterable[Source]) -> dict[str, list[tuple[Path, str]]]:
    """Return the classes that a name may give plans to, itself among them: each with its file.

    Args:
        sources: the files whose classes are looked at.
    """
    found: dict[bytes, list[tuple[Path, str]]] = defaultdict(list)
    for source in sources:
        data = _lines(source)
        aliases = _aliases(data[: data.find(b"\nclass ")])
        for header in _HEADER.finditer(data):
            heir = source.path, header[1].decode("utf-8", "replace")
            found[header[1]].append(heir)
            for base in _NAME.findall(header[2] or b""):
                found[aliases.get(base, base)].append(heir)
    return {name.decode("utf-8", "replace"): heirs for name, heirs in found.items()}


def importers_by_folder(sources: Iterable[Source]) -> dict[str, list[Path]]:
    """Return the files that mention plans by the words of the modules they import from, model folders among them."""
    found: dict[bytes, dict[Path, None]] = defaultdict(dict)
    for source in sources:
        for module in _MODULE.findall(_lines(source)) if b"_plan" in source.data else ():
            for word in _NAME.findall(module):
                found[word][source.path] = None
    return {word.decode("utf-8", "replace"): list(paths) for word, paths in found.items()}


def _lines(source: Source) -> bytes:
    """Return a file's text; of one that is no text in its own codec, which only a parser may complain of, its bytes."""
    try:
        return source.lines
    except SourceError:
        return b"\n" + source.data


def _aliases(head: bytes) -> dict[bytes, bytes]:
    """Return the other names that the beginning of a file gives to classes, with those they stand for."""
    found: dict[bytes, bytes] = {}
    for match in _ALIAS.finditer(head):
        before = _NAME.findall(head, max(0, match.start() - _LONGEST), match.start())
        found[match[1]] = before[-1] if before else match[1]
    return found | {name: found.get(meant, meant) for name, meant in _SECOND_NAME.findall(head)}
