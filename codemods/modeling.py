"""Modeling source without running it: which attributes its classes assign, and what each assignment constructs.

Modeling files are long and a plan key needs few of their lines: one pass finds where classes and assignments begin,
and only the statements that a question leads to are parsed.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from codemods.sources import read_source

__all__ = ["ELEMENT", "KINDS", "UNKNOWN", "ClassSource", "ModelingSource", "Node", "NodeKind", "read_modeling"]

NodeKind = Literal["class", "linear", "embedding", "list", "leaf", "parameter", "unknown"]
ELEMENT = "*"

_CLASS = re.compile(rb"^class (\w+)[ \t]*(?:\(([^)]*)\))?[ \t]*:", re.MULTILINE)
_ATTRIBUTE = re.compile(
    rb"^[ \t]+self(?:\.(?P<assigned>\w+)(?:[ \t]*:[^=\n]+)?[ \t]*=(?!=)"
    rb"|(?P<listed>(?:\.\w+)?)\.(?:append|extend)\("
    rb"|\.(?:register_parameter|register_buffer|add_module|register_module)\(\s*f?[\"'](?P<registered>[^\"'{]*)[\"'{])",
    re.MULTILINE,
)
_IMPORT = re.compile(
    rb"^from \S*(?:\.models\.\S+|modeling_(?!utils|outputs|layers|rope|attn|flash)\w+) import (\([^)]*\)|[^(\n]+)",
    re.MULTILINE,
)
_SIBLING = re.compile(rb"^from \.\.(\w+)\.configuration_", re.MULTILINE)
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
        data: the file's bytes.
        start: where the class begins.
        end: where it ends, exclusive.
        attributes: name to the places of its assignments; `*` for what the class appends to itself.
    """

    name: str
    bases: tuple[str, ...]
    path: Path
    data: bytes = field(repr=False)
    start: int = field(repr=False)
    end: int = field(repr=False)
    attributes: Mapping[str, tuple[int, ...]] = field(repr=False)


@dataclass(frozen=True, eq=False)
class ModelingSource:
    """One model folder's modeling files.

    Args:
        classes: by name.
        borrowed: names imported from other models' modeling files, whose attributes are not read here.
    """

    classes: Mapping[str, ClassSource]
    borrowed: frozenset[str]

    def lineage(self, name: str) -> list[ClassSource]:
        """Return a class and its bases in this folder, nearest first."""
        names = [name]
        for current in names:
            if current in self.classes:
                names += [base for base in self.classes[current].bases if base not in names]
        return [self.classes[one] for one in names if one in self.classes]

    def outer_bases(self, name: str) -> set[str]:
        """Return the bases of a class that are defined elsewhere."""
        return {base for one in self.lineage(name) for base in one.bases if base not in self.classes}

    def kind(self, name: str) -> NodeKind:
        """Return what instances of a class are: a class made from `nn.Linear` is one."""
        return next((KINDS[base] for base in sorted(self.outer_bases(name)) if base in KINDS), "class")


def read_modeling(folder: Path) -> ModelingSource:
    """Read the modeling files of a model folder; of one that has none, those of the models it is made from.

    Raises:
        SourceError: a file cannot be read.
    """
    paths = sorted(folder.glob("modeling_*.py")) or sorted(_of_parents(folder))
    files = {path: read_source(path).data for path in paths}
    classes = {one.name: one for path, data in files.items() for one in _classes(path, data)}
    return ModelingSource(classes, frozenset(name for data in files.values() for name in _imported(data)))


def _imported(data: bytes) -> Iterator[str]:
    for match in _IMPORT.finditer(data):
        yield from (_text(name.strip().rpartition(b" ")[2]) for name in match[1].strip(b"()").split(b","))


def _of_parents(folder: Path) -> Iterator[Path]:
    """Yield the modeling files of the models that a folder with a configuration alone imports its classes from."""
    for modular in folder.glob("modular_*.py"):
        for match in _SIBLING.finditer(read_source(modular).data):
            yield from (folder.parent / _text(match[1])).glob("modeling_*.py")


def _classes(path: Path, data: bytes) -> Iterator[ClassSource]:
    headers = list(_CLASS.finditer(data))
    starts = [header.start() for header in headers]
    ends = [*starts[1:], len(data)][: len(starts)]
    attributes: list[dict[str, list[int]]] = [defaultdict(list) for _ in headers]
    for match in _ATTRIBUTE.finditer(data):
        owner = bisect_right(starts, match.start()) - 1
        if owner >= 0:
            attributes[owner][_attribute(match)].append(match.start())
    for header, end, found in zip(headers, ends, attributes, strict=True):
        places = {name: tuple(where) for name, where in found.items()}
        yield ClassSource(_text(header[1]), _bases(header), path, data, header.start(), end, places)


def _bases(header: re.Match[bytes]) -> tuple[str, ...]:
    listed = (base.strip() for base in (header[2] or b"").split(b",") if b"=" not in base)
    return tuple(_text(base.rpartition(b".")[2]) for base in listed if base)


def _attribute(match: re.Match[bytes]) -> str:
    name = match["assigned"] or match["registered"] or (match["listed"] or b"").removeprefix(b".")
    return _text(name) or ELEMENT


def _text(name: bytes) -> str:
    """Read a name; in a file that is no text it is only never found."""
    return name.decode("utf-8", "replace")
