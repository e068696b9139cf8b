"""The version that a package's `__init__.py` gives itself, read from its text.

It is usually one string. It may also be put together from strings, or imported from a file beside it. If its text does
not show it, or shows several, it is unknown: a wrong version would give every style of the tree another meaning.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from codemods.files.sources import read_source
from plans.errors import SourceError

__all__ = ["VERSION_NAME", "read_version"]

VERSION_NAME = b"__version__"

_VERSION = re.compile(r"\d+\.\d+[\w.+-]*")
_TEXT = re.compile(rb"^__version__\s*(?::\s*\w+\s*)?=\s*[\"'](\d+\.\d+[\w.+-]*)[\"']\s*(?:#.*)?$", re.MULTILINE)
_MAX_DEPTH = 5  # names that stand for other names, and files that import from other files


def read_version(file: Path) -> str | None:
    """Return the version that a file gives, None if its text does not show one.

    Raises:
        SourceError: the file cannot be read.
    """
    return _read_file(file, VERSION_NAME.decode(), 0)


def _read_file(file: Path, name: str, depth: int) -> str | None:
    data = read_source(file).data
    if name.encode() not in data or depth > _MAX_DEPTH:
        return None
    values, imports = _scan(data, name)
    versions = set(values)
    for level, module, imported in imports:
        folder = file.parents[level - 1]
        below = folder.joinpath(*module.split("."))
        other = next((path for path in (below.with_suffix(".py"), below / "__init__.py") if path.is_file()), None)
        try:
            versions.add(_read_file(other, imported, depth + 1) if other else None)
        except SourceError:
            versions.add(None)
    # A shim may have a word such as "unknown" for where nothing was built.
    versions = {version for version in versions if version is None or _VERSION.fullmatch(version)}
    return versions.pop() if len(versions) == 1 else None


@lru_cache(maxsize=64)
def _scan(data: bytes, name: str) -> tuple[tuple[str | None, ...], tuple[tuple[int, str, str], ...]]:
    """Return the values that a file assigns to a name, and the level, module and name of what it imports as it."""
    try:
        statements = list(_iter_statements(ast.parse(data.removeprefix(b"\xef\xbb\xbf")).body))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        match = _TEXT.search(data)
        return ((match[1].decode(),) if match else ()), ()
    constants: dict[str, list[ast.expr]] = {}
    imports: list[tuple[int, str, str]] = []
    for statement in statements:
        match statement:
            case ast.Assign(targets=targets, value=value):
                for target in targets:
                    if isinstance(target, ast.Name):
                        constants.setdefault(target.id, []).append(value)
            case ast.AnnAssign(target=ast.Name(id=target_name), value=ast.expr() as value):
                constants.setdefault(target_name, []).append(value)
            case ast.ImportFrom(level=level, module=str(module), names=names) if level:
                imports += [(level, module, alias.name) for alias in names if (alias.asname or alias.name) == name]

    def evaluate(node: ast.expr, depth: int) -> str | None:
        match node:
            case ast.Constant(value=str(text)):
                return text
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                return join([left, right], depth)
            case ast.JoinedStr(values=parts):
                return join(parts, depth)
            case ast.FormattedValue(value=value, conversion=-1, format_spec=None):
                return evaluate(value, depth)
            case ast.Name(id=other) if depth < _MAX_DEPTH and len(constants.get(other, ())) == 1:
                return evaluate(constants[other][0], depth + 1)
        return None

    def join(parts: list[ast.expr], depth: int) -> str | None:
        texts = [evaluate(part, depth) for part in parts]
        return "".join(text for text in texts if text) if None not in texts else None

    return tuple(evaluate(value, 0) for value in constants.get(name, ())), tuple(imports)


def _iter_statements(statements: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield statements with those in their blocks, but not those of functions and classes."""
    for statement in statements:
        yield statement
        if isinstance(statement, (ast.If, ast.Try, ast.With)):
            for block in ("body", "orelse", "finalbody"):
                yield from _iter_statements(getattr(statement, block, []))
            for handler in getattr(statement, "handlers", []):
                yield from _iter_statements(handler.body)
