"""Classes by the names that they inherit from, by their headers alone: a quick first look, never the last word."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from codemods.files.sources import SourceFile
from codemods.reading.module import Module
from plans.errors import SourceError

__all__ = ["index_importers", "index_subclasses"]

_HEADER = re.compile(rb"\nclass (\w+)[ \t]*(?:\(([^)]*)\))?")
_NAME = re.compile(rb"\w+")
_ALIAS = re.compile(rb" as (\w+)")
_ASSIGNED_ALIAS = re.compile(rb"\n(\w+) = (\w+)[ \t]*(?=\n)")
_MODULE = re.compile(rb"\n[ \t]*from[ \t]+([\w.]*\.[\w.]*)[ \t]+import\b")
_ALIAS_WINDOW = 80  # bytes before an alias in which the name is looked for


def index_subclasses(sources: Iterable[SourceFile], known: Mapping[Path, Module]) -> dict[str, list[tuple[Path, str]]]:
    """Return the classes that a name may give plans to, itself among them: each with its file.

    Args:
        sources: the files whose classes are looked at.
        known: what has been read of some of them.
    """
    found: dict[str, list[tuple[Path, str]]] = defaultdict(list)
    for source in sources:
        module = known.get(source.path)
        headers = _read_headers(module) if module else _scan_headers(source)
        aliases = _read_aliases(source)
        for name, bases in headers:
            heir = source.path, name
            found[name].append(heir)
            for base in bases:
                found[aliases.get(base, base)].append(heir)
    return dict(found)


def index_importers(sources: Iterable[SourceFile]) -> dict[str, list[Path]]:
    """Return the files that mention plans by the words of the modules they import from, model folders among them."""
    found: dict[bytes, dict[Path, None]] = defaultdict(dict)
    for source in sources:
        for module in _MODULE.findall(_read_lines(source)) if b"_plan" in source.data else ():
            for word in _NAME.findall(module):
                found[word][source.path] = None
    return {word.decode("utf-8", "replace"): list(paths) for word, paths in found.items()}


def _read_lines(source: SourceFile) -> bytes:
    """Return a file's text; of one that is no text in its own codec, which only a parser may complain of, its bytes."""
    try:
        return source.lines
    except SourceError:
        return b"\n" + source.data


def _read_headers(module: Module) -> Iterator[tuple[str, Sequence[str]]]:
    for name, owner in module.classes.items():
        if name and "." not in name:
            yield name, [word for base in owner.bases for word in base.split(".")]


def _scan_headers(source: SourceFile) -> Iterator[tuple[str, Sequence[str]]]:
    for header in _HEADER.finditer(_read_lines(source)):
        yield _decode(header[1]), [_decode(word) for word in _NAME.findall(header[2] or b"")]


def _read_aliases(source: SourceFile) -> dict[str, str]:
    """Return the other names that the beginning of a file gives to classes, with those they stand for."""
    data = _read_lines(source)
    head = data[: data.find(b"\nclass ")]
    found: dict[str, str] = {}
    for match in _ALIAS.finditer(head) if b" as " in head else ():
        before = _NAME.findall(head, max(0, match.start() - _ALIAS_WINDOW), match.start())
        found[_decode(match[1])] = _decode(before[-1] if before else match[1])
    second = _ASSIGNED_ALIAS.findall(head) if b" = " in head else ()
    return found | {_decode(name): found.get(_decode(meant), _decode(meant)) for name, meant in second}


def _decode(name: bytes) -> str:
    """Read a name; in a file that is no text it is only never found."""
    return name.decode("utf-8", "replace")
