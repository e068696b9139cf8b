"""One file of modeling source as text: its classes, and what its other names are bound to.

Modeling files are long and a question needs few of their lines. One pass finds where classes and assignments begin;
only the statements that a question leads to are parsed.
"""

from __future__ import annotations

import ast
import re
import textwrap
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import NamedTuple

from codemods.files.headers import decode_name, scan_classes, scan_imports

__all__ = ["ELEMENT", "ClassSource", "ImportedName", "ModuleText", "ParsedClass", "parse_class"]

ELEMENT = "*"
"""The attribute name that stands for what a class appends to itself."""

_ATTRIBUTE = re.compile(
    rb"\n[ \t]+self(?:\.(?P<assigned>\w+)(?:[ \t]*:[^=\n]+)?[ \t]*=(?!=)"
    rb"|(?P<listed>(?:\.\w+)?)\.(?:append|extend)\("
    rb"|\.(?:register_parameter|register_buffer|add_module|register_module)\(\s*f?[\"'](?P<registered>[^\"'{]*)[\"'{])"
)
_TOP_LEVEL = re.compile(rb"\n(\w+)")
_BOUND = re.compile(rb"[ \t]*(?:(?:async[ ])?def (?P<function>\w+)|(?P<assigned>\w+)(?:[ \t]*:[^=\n]+)?[ \t]*=(?!=))")
_BLOCKS = frozenset({b"if", b"elif", b"else", b"try", b"except", b"finally", b"with", b"for", b"while", b"match"})
_DECORATOR_WINDOW = 2000  # bytes above a class that are searched for its decorators


class ImportedName(NamedTuple):
    """A name as an import statement spells it.

    Args:
        level: the number of leading dots, 0 where absolute.
        parts: the module after the dots and the name, split at their dots.
    """

    level: int
    parts: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class ClassSource:
    """A class, and where the statements begin that give it attributes.

    Args:
        name: the class's name, empty for the top level of a file.
        bases: the base classes as written.
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

    @property
    def where(self) -> str:
        """The file and the class for people: `modeling_mixtral.py:MixtralExperts`."""
        return f"{self.path.name}:{self.name}"

    def format_line(self, offset: int) -> str:
        """Return the file and the line of an offset for people: `modeling_mixtral.py:87`."""
        return f"{self.path.name}:{self.data.count(10, 0, offset)}"


@dataclass(frozen=True, eq=False)
class ModuleText:
    """A file, and what the names of its top level are bound to, in the branches of `try` and `if` too.

    Args:
        path: the file.
        data: its bytes after a line end.
    """

    path: Path
    data: bytes = field(repr=False)

    @cached_property
    def classes(self) -> Mapping[str, Sequence[ClassSource]]:
        """The classes by name; of several outside of branches, the last."""
        headers = [one for one in scan_classes(self.data, nested=True) if self._is_top_level(one.start)]
        starts = [header.start + 1 for header in headers]
        found: dict[str, list[ClassSource]] = defaultdict(list)
        for header, start, end in zip(headers, starts, [*starts[1:], len(self.data)], strict=False):
            if not self.data[start : start + 1].isspace():
                found[header.name].clear()
            found[header.name].append(ClassSource(header.name, header.bases, self.path, self.data, start, end))
        return dict(found)

    @cached_property
    def top_level(self) -> ClassSource:
        """The file's top level, as a scope in which its expressions are read."""
        return ClassSource("", (), self.path, self.data, 0, 0)

    @cached_property
    def imports(self) -> Mapping[str, Sequence[ImportedName]]:
        """The imports by the name that they bind, those inside functions included; under `*`, whole modules."""
        found: dict[str, list[ImportedName]] = defaultdict(list)
        for statement in scan_imports(self.data):
            module = tuple(filter(None, statement.module.split(".")))
            if statement.listed:
                for name, bound in statement.names:
                    parts = module if name == "*" else (*module, name)
                    found[bound].append(ImportedName(statement.level, parts))
            elif module:
                bound = statement.alias or module[0]
                found[bound].append(ImportedName(statement.level, module if statement.alias else module[:1]))
        return {name: tuple(dict.fromkeys(targets)) for name, targets in found.items()}

    def find_assignments(self, name: str) -> Sequence[int]:
        """Return the offsets of the statements that assign a name."""
        return self._bindings["assigned", name.encode(errors="replace")]

    def find_functions(self, name: str) -> Sequence[int]:
        """Return the offsets of the functions of a name."""
        return self._bindings["function", name.encode(errors="replace")]

    @cached_property
    def _bindings(self) -> Mapping[tuple[str, bytes], Sequence[int]]:
        """The offsets of functions and assignments by kind and name."""
        found: dict[tuple[str, bytes], list[int]] = defaultdict(list)
        starts = [match.start() + 1 for match in self._top_level_lines]
        for start, end in self._blocks:
            starts += [match.end() for match in re.compile(rb"\n(?=[ \t])").finditer(self.data, start, end)]
        for match in filter(None, (_BOUND.match(self.data, start) for start in starts)):
            kind = str(match.lastgroup)
            found[kind, match[kind]].append(match.start())
        return found

    def _is_top_level(self, start: int) -> bool:
        """Return whether the line after an offset stands in no function or class."""
        return not self.data[start + 1 : start + 2].isspace() or any(first < start < end for first, end in self._blocks)

    @cached_property
    def _blocks(self) -> Sequence[tuple[int, int]]:
        """Where the branches of the top level begin and end."""
        lines = self._top_level_lines
        ends = [*(match.start() for match in lines[1:]), len(self.data)]
        return [(match.start() + 1, end) for match, end in zip(lines, ends, strict=False) if match[1] in _BLOCKS]

    @cached_property
    def _top_level_lines(self) -> Sequence[re.Match[bytes]]:
        return list(_TOP_LEVEL.finditer(self.data))


class ParsedClass(NamedTuple):
    """A class's syntax, and the number of lines above it in its file."""

    node: ast.ClassDef
    lines_above: int


@lru_cache(maxsize=1024)
def parse_class(source: ClassSource) -> ParsedClass | None:
    """Parse one class alone: modeling files are long and hold few experts classes."""
    first = source.data[source.start : source.end]
    indent = first[: len(first) - len(first.lstrip(b" \t"))]
    following = re.compile(rb"^[ \t]{0,%d}(?=[@\w])" % len(indent), re.MULTILINE).search(source.data, source.start + 1)
    start = _include_decorators(source.data, source.start, indent)
    text = source.data[start : following.start() if following else len(source.data)]
    try:
        parsed = ast.parse(textwrap.dedent(text.decode()) if indent else text).body
    except (SyntaxError, ValueError):
        return None
    definition = next((statement for statement in parsed if isinstance(statement, ast.ClassDef)), None)
    return ParsedClass(definition, source.data.count(b"\n", 0, start) - 1) if definition else None


def _include_decorators(data: bytes, start: int, indent: bytes) -> int:
    """Move the start of a class up over its decorators."""
    same_level = re.compile(rb"^%b(?=[@\w])" % indent, re.MULTILINE)
    while above := list(same_level.finditer(data, max(0, start - _DECORATOR_WINDOW), start)):
        if not data.startswith(b"@", above[-1].end()):
            break
        start = above[-1].start()
    return start


def _parse_attribute(match: re.Match[bytes]) -> str:
    name = match["assigned"] or match["registered"] or (match["listed"] or b"").removeprefix(b".")
    return decode_name(name) or ELEMENT
