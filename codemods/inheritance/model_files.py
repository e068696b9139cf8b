"""Where names of a model's file lead among the models: to a module's file, a second name, or the package above."""

from __future__ import annotations

import re
from pathlib import Path

from codemods.files.sources import SourceFile
from codemods.inheritance.imports import ImportedClass

__all__ = ["find_module_file", "is_from_package", "resolve_alias"]

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
