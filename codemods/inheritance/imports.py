"""What a base class's name means: a class of the same file, or one that an import brings in from another."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from codemods.reading.module import Import, Module

__all__ = ["Imported", "imported", "local_class", "module_files"]


@dataclass(frozen=True)
class Imported:
    """A class in another file, as far as the importing file tells.

    Args:
        level: the number of leading dots of the import, 0 where absolute.
        module: what follows them.
        class_name: the class's qualified name there.
    """

    level: int
    module: str
    class_name: str


def local_class(module: Module, class_name: str, base: str) -> str | None:
    """Return the class of the same file that a base of a class is, None where it is none of them.

    Args:
        module: the file.
        class_name: the qualified name of the class that inherits.
        base: as written, dotted.
    """
    scope, _, _ = class_name.rpartition(".")
    names = (f"{scope}.{base}", base) if scope else (base,)
    return next((name for name in names if name in module.classes and name != class_name), None)


def imported(module: Module, name: str) -> Iterator[Imported]:
    """Yield what a dotted name may mean that a file imports: `Config`, `configuration.Config`, `Outer.Config`."""
    parts = name.split(".")
    for size in range(len(parts), 0, -1):
        found = module.imports.get(".".join(parts[:size]))
        if found is not None:
            yield from _meanings(found, parts[size:])
            return
    if len(parts) > 1:
        yield from _meanings(Import(0, "", ""), parts)
    elif everything := module.imports.get("*"):
        yield Imported(everything.level, everything.module, name)


def _meanings(found: Import, rest: list[str]) -> Iterator[Imported]:
    """Yield the ways to cut what stands below an import into modules and classes, the longest module first."""
    below = [found.name, *rest] if found.name else rest
    for size in range(len(below) - 1, -1, -1):
        module = ".".join(filter(None, [found.module, *below[:size]]))
        if found.level or module:
            yield Imported(found.level, module, ".".join(below[size:]))


@cache
def module_files(path: Path, level: int, module: str) -> tuple[Path, ...]:
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
