"""Plan literals: every place in a file that writes plan entries down, and the entries it writes.

In a class body a plan attribute is assigned a dict display. In functions plans are also built by code: `self.plan =`,
`|=`, `.update(…)`, `.setdefault(…)`, `plan[key] = style`, through a local name, in loops and branches, with f-strings
for keys; and calls are given plans as arguments, `from_pretrained(tp_plan={…})`. What one expression writes is one
literal.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence

from codemods.files.sources import SourceFile, format_path
from codemods.reading.blocks import iter_blocks
from codemods.reading.gather import merge_classes
from codemods.reading.module import Import, Module
from codemods.reading.reader import create_parser
from plans.errors import SourceError

__all__ = ["read_module"]

_MODELS = ".models"


def read_module(source: SourceFile) -> Module:
    """Read a file's classes with their plans, and where it imports names from.

    Raises:
        SourceError: the file does not parse.
    """
    try:
        return _read_statements(source, _parse(source).body)
    except RecursionError as error:
        raise SourceError(
            f"{format_path(source.path)}: nested too deeply to be read", hint="leave it out", path=str(source.path)
        ) from error


def _read_statements(source: SourceFile, statements: Sequence[ast.stmt]) -> Module:
    reader = create_parser(source, statements)
    found = [*reader.parse_classes(statements), reader.parse_outside_classes(statements)]
    unread = sorted((use for one in found for use in one.unresolved), key=lambda use: use.line)
    imports = dict(_read_imports(statements))
    return Module(merge_classes(found), lambda: imports, tuple(unread))


def _parse(source: SourceFile) -> ast.Module:
    try:
        return ast.parse(source.body)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = getattr(error, "lineno", None) or 1
        reason = getattr(error, "msg", None) or str(error)
        raise SourceError(
            f"{format_path(source.path)}:{line}: does not parse: {reason}",
            hint="mend the file or leave it out",
            path=str(source.path),
            line=line,
        ) from error


def _read_imports(statements: Sequence[ast.stmt], *, nested: bool = False) -> Iterator[tuple[str, Import]]:
    """Yield the names that imports of a file bring in, in `try` and `if` too, the one that counts last.

    Of `import` statements and of nested ones only those are told that lead to a model.
    """
    for statement in statements:
        match statement:
            case ast.ImportFrom(level=level, names=names):
                module = statement.module or ""
                if not nested or level in (1, 2) or _MODELS in f"{'.' * level}{module}":
                    yield from ((alias.asname or alias.name, Import(level, module, alias.name)) for alias in names)
            case ast.Import(names=names):
                named = [alias for alias in names if alias.asname and _MODELS in alias.name]
                yield from ((alias.asname or "", Import(0, alias.name, "")) for alias in named)
            case ast.If() | ast.Try() | ast.With():
                for block, _ in reversed(list(iter_blocks(statement))):
                    yield from _read_imports(block, nested=True)
