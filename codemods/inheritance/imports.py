"""What a base class's name means: a class of the same file, or one that an import brings in from another."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from codemods.reading.module import Import, Module

__all__ = ["ImportedClass", "find_local_class", "list_module_files", "resolve_imported_name"]


@dataclass(frozen=True)
class ImportedClass:
    """A class in another file, as far as the importing file tells.

    Args:
        level: the number of leading dots of the import, 0 where absolute.
        module: what follows them.
        class_name: the class's qualified name there.
    """

    level: int
    module: str
    class_name: str


def find_local_class(module: Module, class_name: str, base: str) -> str | None:
    """Return the class of the same file that a base of a class is, None where it is none of them.

    Args:
        module: the file.
        class_name: the qualified name of the class that inherits.
        base: as written, dotted.
    """
    scope, _, _ = class_name.rpartition(".")
    names = (f"{scope}.{base}", base) if scope else (base,)
    return next((name for name in names if name in module.classes and name != class_name), None)


def resolve_imported_name(module: Module, name: str) -> Iterator[ImportedClass]:
    """Yield what a dotted name may mean that a file imports: `Config`, `configuration.Config`, `Outer.Config`."""
    parts = name.split(".")
    for size in range(len(parts), 0, -1):
        found = module.imports.get(".".join(parts[:size]))
        if found is not None:
            yield from _split_import(found, parts[size:])
            return
    if len(parts) > 1:
        yield from _split_import(Import(0, "", ""), parts)
    elif everything := module.imports.get("*"):
        yield ImportedClass(everything.level, everything.module, name)


def _split_import(base: Import, rest: list[str]) -> Iterator[ImportedClass]:
    """Yield the ways to cut what stands below an import into modules and classes, the longest module first."""
    below = [base.name, *rest] if base.name else rest
    for size in range(len(below) - 1, -1, -1):
        module = ".".join(filter(None, [base.module, *below[:size]]))
        if base.level or module:
            yield ImportedClass(base.level, module, ".".join(below[size:]))


@cache
def list_module_files(path: Path, level: int, module: str) -> tuple[Path, ...]:
    """Return where an import may lead: a module, or a model package that re-exports its configuration.

    Args:
        path: the importing file.
        level: the number of dots; without any, the package lies beside some folder above the file.
        module: what follows them.
    """
    bases = path.parents[level - 1 : level] if level else path.parents
    targets = [target for base in bases if (target := base.joinpath(*module.split("."))).name]
    return tuple(
        file for target in targets for file in (target.with_suffix(".py"), target / f"configuration_{target.name}.py")
    )
