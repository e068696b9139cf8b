"""The files that hold a model's modeling source: those beside its plan, or those of the family that it is run by.

A family may have a configuration only. Then `auto/modeling_auto.py` maps its model type to a class of another family,
whose modeling source decides about its plans.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from codemods.files.headers import scan_imports
from codemods.files.sources import read_source

__all__ = [
    "FileState",
    "find_modeling_files",
    "find_parent_files",
    "find_parent_models",
    "list_modeling_files",
    "read_lines",
    "stat_file",
]

FileState = tuple[int, int, int]
"""What tells that a file has changed: its inode, time and size; zeros where there is none."""

_CONFIGURATION_MODULE = re.compile(r"(\w+)\.configuration_")
_UP_TO_MODELS = 2  # dots of an import that lead from a model's file to the folder of all models
_MODULE = re.compile(rb"\bParameter\(|\bnn\.Module\b")
_MODEL_TYPE = re.compile(rb"\n[ \t]+model_type(?:[ \t]*:[^=\n]+)?[ \t]*=[ \t]*[\"']([\w.-]+)[\"']")
_MAPPED = re.compile(rb"[\"']([\w.-]+)[\"'][ \t]*[,:]\s*(\(\s*[\"'][^()]*\)|[\"']\w+[\"'])")
_WORD = re.compile(rb"\w+")
_COMMENT = re.compile(rb"#[^\n]*")


class _AutoClasses(NamedTuple):
    """What `modeling_auto.py` maps: each model type to its classes, and each class to its model types."""

    of_type: Mapping[bytes, Sequence[bytes]]
    types_of: Mapping[bytes, Sequence[bytes]]


def find_modeling_files(folder: Path, plan_file: Path | None = None) -> tuple[Path, ...]:
    """Return the files that show how a model is built, none if nothing tells which they are.

    Args:
        folder: the model's folder.
        plan_file: the file with the plan; where no modeling file is beside it, it may define the modules itself.

    Raises:
        SourceError: a file cannot be read.
    """
    if beside := list_modeling_files(folder):
        return tuple(beside)
    if plan_file is not None and any(stat_file(plan_file)) and _MODULE.search(read_lines(plan_file)):
        return (plan_file,)
    auto = folder.parent / "auto" / "modeling_auto.py"
    state = stat_file(auto)
    if not any(state):
        return ()
    configurations = tuple(
        (path, stat_file(path)) for pattern in ("configuration_*.py", "modular_*.py") for path in folder.glob(pattern)
    )
    return _find_mapped_files(auto, state, configurations)


def list_modeling_files(folder: Path) -> list[Path]:
    """Return the modeling files in a folder, sorted; none if the folder cannot be listed."""
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries if entry.name.startswith("modeling_"))
    except OSError:
        return []
    return [folder / name for name in names if name.endswith(".py")]


def find_parent_files(folder: Path) -> Iterator[Path]:
    """Yield the modeling files of the models whose configuration a folder's modular files import."""
    for modular in folder.glob("modular_*.py"):
        for parent in find_parent_models(read_lines(modular)):
            yield from list_modeling_files(folder.parent / parent)


def find_parent_models(lines: bytes) -> Iterator[str]:
    """Yield the models whose configuration a modular file imports.

    Args:
        lines: the file's text after a line end.
    """
    for statement in scan_imports(lines):
        if statement.level == _UP_TO_MODELS and (parent := _CONFIGURATION_MODULE.match(statement.module)):
            yield parent[1]


def read_lines(path: Path) -> bytes:
    """Return a file's bytes after a line end.

    Raises:
        SourceError: the file cannot be read.
    """
    return b"\n" + read_source(path).data


def stat_file(path: Path) -> FileState:
    """Return the state of a file."""
    try:
        state = path.stat()
    except OSError:  # reading the file says what is wrong
        return 0, 0, 0
    return state.st_ino, state.st_mtime_ns, state.st_size


@lru_cache(maxsize=1024)
def _find_mapped_files(
    auto: Path, state: FileState, configurations: tuple[tuple[Path, FileState], ...]
) -> tuple[Path, ...]:
    """Return the modeling files of the classes that model types are mapped to, none if one of them is not found."""
    classes = _read_auto_classes(auto, state)
    types = dict.fromkeys(name for path, _ in configurations for name in _MODEL_TYPE.findall(read_lines(path)))
    names = dict.fromkeys(name for model_type in types for name in classes.of_type.get(model_type, ()))
    files = [_find_class_file(auto.parent.parent, name, classes.types_of[name]) for name in names]
    return tuple(dict.fromkeys(path for path in files if path)) if all(files) else ()


@lru_cache(maxsize=4)
def _read_auto_classes(auto: Path, _state: FileState) -> _AutoClasses:
    of_type: dict[bytes, list[bytes]] = defaultdict(list)
    types_of: dict[bytes, list[bytes]] = defaultdict(list)
    for model_type, listed in _MAPPED.findall(_COMMENT.sub(b"", read_lines(auto))):
        for name in _WORD.findall(listed):
            of_type[model_type].append(name)
            types_of[name].append(model_type)
    return _AutoClasses(of_type, types_of)


def _find_class_file(models: Path, name: bytes, model_types: Iterable[bytes]) -> Path | None:
    """Return the modeling file that defines a class: of a family that is named like a model type, else of any."""
    likely = dict.fromkeys(models / one.decode().replace("-", "_") for one in model_types)
    for folders in (likely, sorted(models.iterdir())):
        for folder in folders:
            for path in list_modeling_files(folder):
                if re.search(rb"\nclass %b\b" % name, read_lines(path)):
                    return path
    return None
