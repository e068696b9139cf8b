"""Class headers, imports and aliases, found in a file's bytes without parsing it.

Files of a tree are many and few of them matter to a question, so these scanners decide which ones are worth parsing.
They see only text: what stands inside a string may be reported too, and what is written unusually may be missed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

__all__ = ["ClassHeader", "ImportStatement", "decode_name", "scan_aliases", "scan_classes", "scan_imports"]

# Patterns begin with the literal keyword, which `re` finds many times faster than a line's beginning.
_BASES = rb"\(((?:[^()#]++|#[^\n]*+|\([^()]*+\))*+)\)"
_CLASS = re.compile(rb"class [ \t]*(\w+)[ \t]*(?:" + _BASES + rb"[ \t]*)?:")
_IMPORT = re.compile(rb"import\b[ \t]*(\([^)]*\)|[^\n;\\]*+(?:\\\r?\n[^\n;\\]*+)*+)")
_BEFORE_IMPORT = re.compile(rb"[ \t]*(?:.*[:;][ \t]*)??(?:from(?:[ \t]+|(?=\.))(\.*)(\w[\w.]*)?[ \t]+)?")
_ALIAS = re.compile(rb"\n(\w+) = ([\w.]+)[ \t]*(?:#[^\n]*)?(?=\r?\n)")
_COMMENT = re.compile(rb"#[^\n]*")
_TYPE_ARGUMENTS = re.compile(r"\[[^\]]*\]")
_WORD = re.compile(r"\w+")
_IMPORTED = re.compile(rb"([\w.]+|\*)(?:\s+as\s+(\w+))?")


class ClassHeader(NamedTuple):
    """The first lines of a class statement.

    Args:
        name: the class's own name, without those of classes around it.
        start: the offset of the line end before the statement.
        listed: what stands between its parentheses.
    """

    name: str
    start: int
    listed: bytes

    @property
    def bases(self) -> tuple[str, ...]:
        """The base classes as written, without type arguments and keywords.

        A computed base is cut at its commas; its parts hold parentheses or stand for no class.
        """
        text = decode_name(_COMMENT.sub(b"", self.listed) if b"#" in self.listed else self.listed)
        bases = (base.strip() for base in (_TYPE_ARGUMENTS.sub("", text) if "[" in text else text).split(","))
        return tuple(base for base in bases if base and "=" not in base)

    @property
    def words(self) -> tuple[str, ...]:
        """Every word between the parentheses: the parts of dotted bases, and what computed ones are made from."""
        return tuple(_WORD.findall(decode_name(self.listed)))


class ImportStatement(NamedTuple):
    """One module that a statement imports, or imports names from.

    Args:
        level: the number of leading dots, 0 where absolute.
        module: what follows them.
        listed: the text of the imported names, empty where the module itself is imported.
        alias: the name that the module itself is bound to, empty without `as`.
    """

    level: int
    module: str
    listed: bytes = b""
    alias: str = ""

    @property
    def names(self) -> tuple[tuple[str, str], ...]:
        """Each imported name with the name that it is bound to."""
        return tuple((name, alias or name) for name, alias in _read_names(self.listed))

    @property
    def modules(self) -> Iterator[str]:
        """The modules that the statement may load: the one it names, and each name below it."""
        for name in ("", *(name for name, _ in self.names)):
            if module := ".".join(filter(None, [self.module, name])):
                yield module


def scan_classes(lines: bytes, *, nested: bool = False) -> Iterator[ClassHeader]:
    """Yield the headers of a file's classes.

    Args:
        lines: the file's text after a line end.
        nested: whether to include indented classes.
    """
    for match in _CLASS.finditer(lines):
        start = lines.rfind(b"\n", 0, match.start())
        indent = lines[start + 1 : match.start()]
        if not indent or (nested and indent.isspace()):
            yield ClassHeader(decode_name(match[1]), start, match[2] or b"")


def scan_imports(lines: bytes) -> Iterator[ImportStatement]:
    """Yield what a file imports, at any depth.

    Args:
        lines: the file's text after a line end.
    """
    for match in _IMPORT.finditer(lines):
        start = match.start()
        before = _BEFORE_IMPORT.fullmatch(lines, lines.rfind(b"\n", 0, start) + 1, start)
        if before is None:
            continue
        if before[1] is None:
            yield from (ImportStatement(0, name, alias=alias) for name, alias in _read_names(match[1]))
        else:
            yield ImportStatement(len(before[1]), decode_name(before[2] or b""), match[1])


def scan_aliases(lines: bytes) -> Iterator[tuple[str, str]]:
    """Yield each top-level name that is assigned another name, with that other: `Base = ToyConfig`.

    Args:
        lines: the file's text after a line end.
    """
    for alias, name in _ALIAS.findall(lines):
        yield decode_name(alias), decode_name(name)


def _read_names(listed: bytes) -> Iterator[tuple[str, str]]:
    """Yield the names of an import statement, each with its alias, empty without one."""
    for name, alias in _IMPORTED.findall(_COMMENT.sub(b"", listed) if b"#" in listed else listed):
        yield decode_name(name), decode_name(alias)


def decode_name(name: bytes) -> str:
    """Decode a name; one from a file that is not UTF-8 text then simply matches no other."""
    return name.decode("utf-8", "replace")
