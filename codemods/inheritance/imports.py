"""What a base class's name means: a class of the same file, or one that an import brings in from another."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from codemods.files.sources import SourceFile
from codemods.reading.module import Import, Module

__all__ = [
    "ImportedClass",
    "find_local_class",
    "find_module_file",
    "is_from_package",
    "list_module_files",
    "resolve_alias",
    "resolve_imported_name",
]


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


_MODELS = "models"
"""The package of all models, `transformers.models`: absolute imports from below it stay in the tree."""

_UP_TO_MODELS = 2
"""The dots of an import that lead from a model's file to the folder of all models."""


def resolve_alias(source: SourceFile, name: str) -> str | None:
    """Return what a name of a module stands for that is a name itself: `Base = ToyConfig`."""
    if b"\n" + name.encode() + b" = " not in source.data:
        return None
    found = re.findall(rb"^" + re.escape(name.encode()) + rb" = ([\w.]+)[ \t]*(?:#.*)?\r?$", source.data, re.MULTILINE)
    meant = found[0].decode("utf-8", "replace") if len(found) == 1 else name
    return meant if meant != name else None


def is_from_package(imported: ImportedClass) -> bool:
    """Say whether a class is imported from the package that holds all models: `from transformers import ToyConfig`."""
    return imported.level > _UP_TO_MODELS and not imported.module if imported.level else "." not in imported.module


def find_module_file(path: Path, level: int, module: str) -> Path | None:
    """Return the file of an imported module, None for one of the library around the models."""
    parts = tuple(module.split(".")) if module else ()
    if level:
        bases = path.parents[level - 1 : level]
        bases = [base for base in bases if level <= _UP_TO_MODELS or _MODELS in base.parts + parts]
        return next((_find_existing_file(base.joinpath(*parts)) for base in bases), None)
    if _MODELS in parts:
        return _find_existing_file(path.parents[1].joinpath(*parts[parts.index(_MODELS) + 1 :]))
    return None


def _find_existing_file(module: Path) -> Path | None:
    """Return the file of a module, or the configuration file of a model package that re-exports it."""
    if not module.name:
        return None
    candidates = (module.with_suffix(".py"), module / f"configuration_{module.name}.py")
    return next((path for path in candidates if path.is_file()), None)
