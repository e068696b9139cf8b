"""Modeling source read without running it: a folder's classes, their bases, and where their attributes are assigned.

Modeling files are long and a plan key needs few of their lines. One pass finds where classes and assignments begin;
only the statements that a question leads to are parsed.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path

from codemods.files.headers import decode_name, scan_classes, scan_imports
from codemods.files.sources import read_source

__all__ = [
    "ELEMENT",
    "ClassSource",
    "ModelingSource",
    "find_parent_models",
    "list_modeling_files",
    "load_modeling",
]

ELEMENT = "*"
"""The attribute name that stands for what a class appends to itself."""

_ATTRIBUTE = re.compile(
    rb"\n[ \t]+self(?:\.(?P<assigned>\w+)(?:[ \t]*:[^=\n]+)?[ \t]*=(?!=)"
    rb"|(?P<listed>(?:\.\w+)?)\.(?:append|extend)\("
    rb"|\.(?:register_parameter|register_buffer|add_module|register_module)\(\s*f?[\"'](?P<registered>[^\"'{]*)[\"'{])"
)
_MODEL_MODULE = re.compile(r"(?:^|\.)models\.|modeling_(?!utils|outputs|layers|rope|attn|flash)")
_CONFIGURATION_MODULE = re.compile(r"(\w+)\.configuration_")
_UP_TO_MODELS = 2  # dots of an import that lead from a model's file to the folder of all models


@dataclass(frozen=True, eq=False)
class ClassSource:
    """A class, and where the statements begin that give it attributes.

    Args:
        name: the class's name.
        bases: the names of its base classes without the modules before them; computed ones as written.
        path: the class's file.
        data: the file's bytes after a line end, so that every line has one before it.
        start: the offset where the class begins.
        end: the offset where it ends, exclusive.
    """

    name: str
    bases: tuple[str, ...]
    path: Path
    data: bytes = field(repr=False)
    start: int = field(repr=False)
    end: int = field(repr=False)

    @cached_property
    def attributes(self) -> Mapping[str, Sequence[int]]:
        """From each attribute's name to the offsets of its assignments; under `ELEMENT`, what the class appends."""
        offsets: dict[str, list[int]] = defaultdict(list)
        for match in _ATTRIBUTE.finditer(self.data, self.start, self.end):
            offsets[_parse_attribute(match)].append(match.start() + 1)
        return dict(offsets)

    def has_attribute(self, name: str) -> bool:
        """Return whether the class assigns an attribute; where its text never mentions the name, nothing is scanned."""
        mentioned = name == ELEMENT or self.data.find(name.encode(errors="replace"), self.start, self.end) >= 0
        return mentioned and name in self.attributes


@dataclass(frozen=True, eq=False)
class ModelingSource:
    """The modeling files of one model folder.

    Args:
        files: their bytes, each after a line end.
    """

    files: Mapping[Path, bytes]

    @cached_property
    def classes(self) -> Mapping[str, ClassSource]:
        """The classes by name; of two with one name, the later."""
        return {one.name: one for path, data in self.files.items() for one in _scan_class_sources(path, data)}

    @cached_property
    def imported_names(self) -> frozenset[str]:
        """The names imported from other models' modeling files, whose attributes are not read here."""
        statements = (statement for data in self.files.values() for statement in scan_imports(data))
        modules = (statement for statement in statements if _MODEL_MODULE.search(statement.module))
        return frozenset(bound for statement in modules for _, bound in statement.names)

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

    def inherits_unread(self, name: str) -> bool:
        """Return whether a class inherits from another model's class or a computed one, so may have any attribute."""
        external = self.external_bases(name)
        return not external.isdisjoint(self.imported_names) or any("(" in base for base in external)


def load_modeling(folder: Path) -> ModelingSource:
    """Return the modeling files of a model folder, or of the models that it is derived from if it has none.

    They are read again only when the files or their states have changed.

    Raises:
        SourceError: a file cannot be read.
    """
    paths = tuple(list_modeling_files(folder) or sorted(_find_parent_files(folder)))
    return _load_state(paths, tuple(map(_stat, paths)))


@lru_cache(maxsize=1024)
def _load_state(paths: tuple[Path, ...], _states: tuple[tuple[int, int, int], ...]) -> ModelingSource:
    return ModelingSource({path: _read_lines(path) for path in paths})


def _stat(path: Path) -> tuple[int, int, int]:
    try:
        state = path.stat()
    except OSError:  # reading the file says what is wrong
        return 0, 0, 0
    return state.st_ino, state.st_mtime_ns, state.st_size


def list_modeling_files(folder: Path) -> list[Path]:
    """Return the modeling files in a folder, sorted; none if the folder cannot be listed."""
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries if entry.name.startswith("modeling_"))
    except OSError:
        return []
    return [folder / name for name in names if name.endswith(".py")]


def find_parent_models(lines: bytes) -> Iterator[str]:
    """Yield the models whose configuration a modular file imports.

    Args:
        lines: the file's text after a line end.
    """
    for statement in scan_imports(lines):
        if statement.level == _UP_TO_MODELS and (parent := _CONFIGURATION_MODULE.match(statement.module)):
            yield parent[1]


def _read_lines(path: Path) -> bytes:
    return b"\n" + read_source(path).data


def _find_parent_files(folder: Path) -> Iterator[Path]:
    for modular in folder.glob("modular_*.py"):
        for parent in find_parent_models(_read_lines(modular)):
            yield from list_modeling_files(folder.parent / parent)


def _scan_class_sources(path: Path, data: bytes) -> Iterator[ClassSource]:
    headers = list(scan_classes(data))
    starts = [header.start + 1 for header in headers]
    for header, start, end in zip(headers, starts, [*starts[1:], len(data)], strict=False):
        bases = (base if "(" in base else base.rpartition(".")[2] for base in header.bases)
        yield ClassSource(header.name, tuple(bases), path, data, start, end)


def _parse_attribute(match: re.Match[bytes]) -> str:
    name = match["assigned"] or match["registered"] or (match["listed"] or b"").removeprefix(b".")
    return decode_name(name) or ELEMENT
