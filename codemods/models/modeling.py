"""Modeling source without running it: which attributes its classes assign, and what each assignment constructs.

Modeling files are long and a plan key needs few of their lines: one pass finds where classes and assignments begin,
and only the statements that a question leads to are parsed.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

from codemods.files.sources import read_source

__all__ = [
    "ELEMENT",
    "KINDS",
    "UNKNOWN",
    "ClassSource",
    "ModelingSource",
    "Node",
    "NodeKind",
    "list_modeling_files",
    "read_modeling",
]

NodeKind = Literal["class", "linear", "embedding", "list", "leaf", "parameter", "unknown"]
ELEMENT = "*"

# Lines are looked for by the line end before them, which `re` finds several times faster than `^`.
_CLASS = re.compile(rb"\nclass (\w+)[ \t]*(?:\(([^)]*)\))?[ \t]*:")
_ATTRIBUTE = re.compile(
    rb"\n[ \t]+self(?:\.(?P<assigned>\w+)(?:[ \t]*:[^=\n]+)?[ \t]*=(?!=)"
    rb"|(?P<listed>(?:\.\w+)?)\.(?:append|extend)\("
    rb"|\.(?:register_parameter|register_buffer|add_module|register_module)\(\s*f?[\"'](?P<registered>[^\"'{]*)[\"'{])"
)
_IMPORT = re.compile(
    rb"\nfrom \S*(?:\.models\.\S+|modeling_(?!utils|outputs|layers|rope|attn|flash)\w+) import (\([^)]*\)|[^(\n]+)"
)
_SIBLING = re.compile(rb"\nfrom \.\.(\w+)\.configuration_")
KINDS: Mapping[str, NodeKind] = {
    "Linear": "linear",
    "Embedding": "embedding",
    "ModuleList": "list",
    "ModuleDict": "list",
    "Sequential": "list",
}


@dataclass(frozen=True)
class Node:
    """Something that an attribute can hold.

    Args:
        kind: `leaf` is a module of torch that is neither Linear nor Embedding.
        name: of the class, for a class.
        rank: of a parameter, where its shape shows it.
        elements: what a list holds.
    """

    kind: NodeKind
    name: str = ""
    rank: int | None = None
    elements: frozenset[Node] = frozenset()


UNKNOWN = Node("unknown")


@dataclass(frozen=True, eq=False)
class ClassSource:
    """A class, and where the statements begin that give it attributes.

    Args:
        name: of the class.
        bases: without the modules they come from.
        path: its file.
        data: the file's bytes after a line end, so that every line has one before it.
        start: where the class begins.
        end: where it ends, exclusive.
    """

    name: str
    bases: tuple[str, ...]
    path: Path
    data: bytes = field(repr=False)
    start: int = field(repr=False)
    end: int = field(repr=False)

    @cached_property
    def attributes(self) -> Mapping[str, Sequence[int]]:
        """Name to the places of its assignments; `*` for what the class appends to itself."""
        found: dict[str, list[int]] = defaultdict(list)
        for match in _ATTRIBUTE.finditer(self.data, self.start, self.end):
            found[_parse_attribute(match)].append(match.start() + 1)
        return dict(found)

    def has_attribute(self, name: str) -> bool:
        """Say whether it has an attribute; where its text does not even mention the name, nothing else is read."""
        mentioned = name == ELEMENT or self.data.find(name.encode(errors="replace"), self.start, self.end) >= 0
        return mentioned and name in self.attributes


@dataclass(frozen=True, eq=False)
class ModelingSource:
    """One model folder's modeling files.

    Args:
        classes: by name.
        imported_names: names imported from other models' modeling files, whose attributes are not read here.
    """

    classes: Mapping[str, ClassSource]
    imported_names: frozenset[str]

    def mro(self, name: str) -> list[ClassSource]:
        """Return a class and its bases in this folder, nearest first."""
        names = [name]
        for current in names:
            if current in self.classes:
                names += [base for base in self.classes[current].bases if base not in names]
        return [self.classes[one] for one in names if one in self.classes]

    def external_bases(self, name: str) -> set[str]:
        """Return the bases of a class that are defined elsewhere."""
        return {base for one in self.mro(name) for base in one.bases if base not in self.classes}

    def get_kind(self, name: str) -> NodeKind:
        """Return what instances of a class are: a class made from `nn.Linear` is one."""
        return next((KINDS[base] for base in sorted(self.external_bases(name)) if base in KINDS), "class")


def read_modeling(folder: Path) -> ModelingSource:
    """Read the modeling files of a model folder; of one that has none, those of the models it is made from.

    Raises:
        SourceError: a file cannot be read.
    """
    paths = list_modeling_files(folder) or sorted(_find_parent_files(folder))
    files = {path: _read_lines(path) for path in paths}
    classes = {one.name: one for path, data in files.items() for one in _parse_classes(path, data)}
    return ModelingSource(classes, frozenset(name for data in files.values() for name in _find_imported_names(data)))


def list_modeling_files(folder: Path) -> list[Path]:
    """Return the modeling files that lie in a folder, sorted; of a folder that cannot be listed none."""
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries if entry.name.startswith("modeling_"))
    except OSError:
        return []
    return [folder / name for name in names if name.endswith(".py")]


def _read_lines(path: Path) -> bytes:
    return b"\n" + read_source(path).data


def _find_imported_names(data: bytes) -> Iterator[str]:
    for match in _IMPORT.finditer(data):
        yield from (_decode(name.strip().rpartition(b" ")[2]) for name in match[1].strip(b"()").split(b","))


def _find_parent_files(folder: Path) -> Iterator[Path]:
    """Yield the modeling files of the models that a folder with a configuration alone imports its classes from."""
    for modular in folder.glob("modular_*.py"):
        for match in _SIBLING.finditer(_read_lines(modular)):
            yield from list_modeling_files(folder.parent / _decode(match[1]))


def _parse_classes(path: Path, data: bytes) -> Iterator[ClassSource]:
    headers = list(_CLASS.finditer(data))
    starts = [header.start() + 1 for header in headers]
    for header, start, end in zip(headers, starts, [*starts[1:], len(data)], strict=False):
        yield ClassSource(_decode(header[1]), _parse_bases(header), path, data, start, end)


def _parse_bases(header: re.Match[bytes]) -> tuple[str, ...]:
    listed = (base.strip() for base in (header[2] or b"").split(b",") if b"=" not in base)
    return tuple(_decode(base.rpartition(b".")[2]) for base in listed if base)


def _parse_attribute(match: re.Match[bytes]) -> str:
    name = match["assigned"] or match["registered"] or (match["listed"] or b"").removeprefix(b".")
    return _decode(name) or ELEMENT


def _decode(name: bytes) -> str:
    """Read a name; in a file that is no text it is only never found."""
    return name.decode("utf-8", "replace")
