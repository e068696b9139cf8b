"""Class headers and import statements, found in a file's bytes without parsing it.

Files of a tree are many and few of them matter to a question, so these scanners decide which ones are worth parsing.
They see only text: what stands inside a string may be reported too, and what is written unusually may be missed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

__all__ = ["ClassHeader", "ImportStatement", "decode_name", "scan_classes", "scan_imports"]

# Lines are found by the line end before them, which `re` searches for several times faster than `^`.
_BASES = rb"\(((?:[^()#]++|#[^\n]*+|\([^()]*+\))*+)\)"
_CLASS = rb"class[ \t]+(\w+)[ \t]*(?:" + _BASES + rb"[ \t]*)?:"
_TOP_LEVEL_CLASS = re.compile(rb"\n" + _CLASS)
_ANY_CLASS = re.compile(rb"\n[ \t]*" + _CLASS)
_IMPORT = re.compile(
    rb"[\n:;][ \t]*(?:from(?:[ \t]+|(?=\.))(\.*)(\w[\w.]*)?[ \t]+import\b[ \t]*(\([^)]*\)|(?:\\\r?\n|[^\n;])*)"
    rb"|import[ \t]+(\w[^\n;]*))"
)
_COMMENT = re.compile(rb"#[^\n]*")
_TYPE_ARGUMENTS = re.compile(r"\[[^\]]*\]")
_WORD = re.compile(rb"\w+")
_IMPORTED = re.compile(rb"([\w.]+|\*)(?:\s+as\s+(\w+))?")


@dataclass(frozen=True)
class ClassHeader:
    """The first lines of a class statement.

    Args:
        name: the class's own name, without those of classes around it.
        start: the offset of the line end before the statement.
        listed: what stands between its parentheses.
    """

    name: str
    start: int
    listed: bytes = field(repr=False)

    @cached_property
    def bases(self) -> tuple[str, ...]:
        """The base classes as written, without type arguments and keywords.

        A computed base is cut at its commas; its parts hold parentheses or stand for no class.
        """
        text = _TYPE_ARGUMENTS.sub("", decode_name(_COMMENT.sub(b"", self.listed)))
        bases = (base.strip() for base in text.split(","))
        return tuple(base for base in bases if base and "=" not in base)

    @cached_property
    def words(self) -> tuple[str, ...]:
        """Every word between the parentheses: the parts of dotted bases, and what computed ones are made from."""
        return tuple(map(decode_name, _WORD.findall(self.listed)))


@dataclass(frozen=True)
class ImportStatement:
    """One module that a statement imports, or imports names from.

    Args:
        level: the number of leading dots, 0 where absolute.
        module: what follows them.
        names: each imported name, and the name it is bound to; empty where the module itself is imported.
        alias: the name that the module itself is bound to, empty without `as`.
    """

    level: int
    module: str
    names: tuple[tuple[str, str], ...] = ()
    alias: str = ""

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
    for match in (_ANY_CLASS if nested else _TOP_LEVEL_CLASS).finditer(lines):
        yield ClassHeader(decode_name(match[1]), match.start(), match[2] or b"")


def scan_imports(lines: bytes) -> Iterator[ImportStatement]:
    """Yield what a file imports, at any depth.

    Args:
        lines: the file's text after a line end.
    """
    for dots, module, names, modules in _IMPORT.findall(lines):
        if modules:
            for name, alias in _read_names(modules):
                yield ImportStatement(0, name, alias=alias)
        else:
            listed = tuple((name, alias or name) for name, alias in _read_names(names))
            yield ImportStatement(len(dots), decode_name(module), listed)


def _read_names(listed: bytes) -> Iterator[tuple[str, str]]:
    """Yield the names of an import statement, each with its alias, empty without one."""
    for name, alias in _IMPORTED.findall(_COMMENT.sub(b"", listed) if b"#" in listed else listed):
        yield decode_name(name), decode_name(alias)


def decode_name(name: bytes) -> str:
    """Decode a name; one from a file that is not UTF-8 text then simply matches no other."""
    return name.decode("utf-8", "replace")
