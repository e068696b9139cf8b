"""The configuration in `[tool.migrator]` of a pyproject.toml: what to read, what to write and what to ignore."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path, PurePath
from typing import Any, NoReturn

from codemods.files.sources import format_path
from plans.dialect_file import is_dialect_file
from plans.errors import UsageError
from plans.rule import load_rules
from plans.text import suggest_name

__all__ = ["Configuration", "find_configuration", "find_project_file", "make_absolute", "read_configuration"]

_FILE_NAME = "pyproject.toml"
_GLOB = r"(\*\*/|\*\*|\*|\?)"
_WILDCARDS = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}


@dataclass(frozen=True)
class Configuration:
    """The settings of a project; options of the command line take precedence.

    Args:
        root: the folder of the pyproject.toml; globs are matched against paths relative to it.
        paths: the files and folders to read if the command line names none.
        target: the dialect to rewrite to, by name or file, None for the default.
        source: the dialect of the tree, by name or file, None to detect it.
        ignore: the codes that are neither reported nor rewritten.
        per_path_ignores: globs with the codes to ignore in the files that they match.
        exclude: globs of the files that are neither reported on nor written.
        link: a folder or file outside of the root, and the location of a link to it in the project.
    """

    root: Path = Path()
    paths: tuple[Path, ...] = ()
    target: str | None = None
    source: str | None = None
    ignore: frozenset[str] = frozenset()
    per_path_ignores: tuple[tuple[str, frozenset[str]], ...] = ()
    exclude: tuple[str, ...] = ()
    link: tuple[Path, Path] | None = None

    def is_included(self, path: Path) -> bool:
        """Return whether a file may be reported on and written."""
        return not self.exclude or self.find_exclude_pattern(path) is None

    def find_exclude_pattern(self, path: Path) -> str | None:
        """Return the glob that excludes a file, or None."""
        return next((pattern for pattern in self.exclude if _is_match(pattern, self._make_relative(path))), None)

    def is_ignored(self, path: Path, code: str) -> bool:
        """Return whether a code is ignored in a file."""
        return code in self.ignore or any(
            code in codes and _is_match(pattern, self._make_relative(path)) for pattern, codes in self.per_path_ignores
        )

    def _make_relative(self, path: Path) -> PurePath:
        if self.link and path.is_relative_to(self.link[0]):
            path = self.link[1] / path.relative_to(self.link[0])
        return path.relative_to(self.root) if path.is_relative_to(self.root) else path


def find_configuration(start: Path) -> Configuration:
    """Return the configuration in the nearest pyproject.toml in or above a folder, or an empty one if there is none.

    Links are followed first; only if their target lies in no project is the project used that contains the link.

    Args:
        start: a folder, or a file, whose folder is used.

    Raises:
        UsageError: the file is not valid TOML, or its table has an unknown key or a value of the wrong type.
    """
    real, given = start.resolve(), make_absolute(start)
    if project := find_project_file(real):
        return read_configuration(project)
    project = find_project_file(given)
    return replace(read_configuration(project), link=(real, given)) if project else Configuration()


def find_project_file(start: Path) -> Path | None:
    """Return the nearest pyproject.toml in or above a folder, or above a file, or None."""
    folders = (start, *start.parents) if start.is_dir() else start.parents
    return next((folder / _FILE_NAME for folder in folders if (folder / _FILE_NAME).is_file()), None)


def make_absolute(path: Path) -> Path:
    """Return an absolute path without `..`; links are not followed."""
    return Path(os.path.abspath(path))  # noqa: PTH100 - `Path.absolute` keeps `..`, `Path.resolve` follows links


def read_configuration(path: Path) -> Configuration:
    """Read one pyproject.toml.

    Raises:
        UsageError: the file cannot be read or is not valid, as for `find_configuration`.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(
            f"{format_path(path)}: cannot be read: {error.strerror}", hint="make it a readable file", path=str(path)
        ) from error
    table = _read_table(path, data) if b"migrator" in data else {}
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key not in _READERS:
            _refuse(path, key, "is not a setting", suggest_name(key, _READERS, "settings are " + ", ".join(_READERS)))
        field = key.replace("-", "_")
        values[field] = _READERS[key](path, key, value)
    return Configuration(path.parent, **values)


def _read_table(path: Path, data: bytes) -> Mapping[str, object]:
    import tomllib

    try:
        tool = tomllib.loads(data.decode()).get("tool", {})
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(
            f"{format_path(path)}: is not valid TOML: {error}", hint="correct the syntax of the file", path=str(path)
        ) from error
    table = tool.get("migrator", {}) if isinstance(tool, dict) else {}
    if not isinstance(table, dict):
        raise UsageError(
            f"{format_path(path)}: tool.migrator is not a table", hint="write it as [tool.migrator]", path=str(path)
        )
    return table


def _read_text(path: Path, key: str, value: object) -> str:
    if not isinstance(value, str):
        _refuse(path, key, f"is {value!r}, not a string", f'write {key} = "…"')
    return value


def _read_dialect(path: Path, key: str, value: object) -> str:
    """Read the name of a dialect, or the path of a file with one, relative to the folder of the configuration."""
    name = _read_text(path, key, value)
    return str(path.parent / name) if is_dialect_file(name) else name


def _read_texts(path: Path, key: str, value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        _refuse(path, key, f"is {value!r}, not a list of strings", f'write {key} = ["…"]')
    return tuple(value)


def _read_paths(path: Path, key: str, value: object) -> tuple[Path, ...]:
    """Read paths below the folder of the file; a project must not make migrator write anywhere else."""
    root = path.parent.resolve()
    paths = tuple(path.parent / text for text in _read_texts(path, key, value))
    for listed in paths:
        if not listed.resolve().is_relative_to(root):
            _refuse(path, key, f"leads out of the project, to {listed}", "name that folder on the command line")
    return paths


def _read_codes(path: Path, key: str, value: object) -> frozenset[str]:
    codes = _read_texts(path, key, value)
    unknown = next((code for code in codes if code not in load_rules()), None)
    if unknown is not None:
        hint = suggest_name(unknown, load_rules(), "`migrator explain` lists the codes")
        _refuse(path, key, f"contains {unknown!r}, which is not the code of a rule", hint)
    return frozenset(codes)


def _read_codes_by_glob(path: Path, key: str, value: object) -> tuple[tuple[str, frozenset[str]], ...]:
    if not isinstance(value, dict):
        _refuse(path, key, f"is {value!r}, not a table", f'write [tool.migrator.{key}] with "glob" = ["MIG…"]')
    return tuple((glob, _read_codes(path, f"{key}.{glob}", codes)) for glob, codes in value.items())


_READERS: Mapping[str, Callable[[Path, str, object], object]] = {
    "paths": _read_paths,
    "target": _read_dialect,
    "source": _read_dialect,
    "ignore": _read_codes,
    "per-path-ignores": _read_codes_by_glob,
    "exclude": _read_texts,
}


def _refuse(path: Path, key: str, problem: str, hint: str) -> NoReturn:
    raise UsageError(f"{format_path(path)}: tool.migrator.{key} {problem}", hint=hint, path=str(path), key=key)


def _is_match(pattern: str, path: PurePath) -> bool:
    """Return whether a glob matches a path or a folder above it; one without a slash matches names at any depth."""
    expression = _compile_glob(pattern.removeprefix("./").strip("/"))
    candidates: Iterable[PurePath] = (path, *path.parents)
    texts = (candidate.as_posix() if "/" in pattern else candidate.name for candidate in candidates)
    return any(expression.fullmatch(text) for text in texts if text)


@cache
def _compile_glob(pattern: str) -> re.Pattern[str]:
    return re.compile("".join(_WILDCARDS.get(part, re.escape(part)) for part in re.split(_GLOB, pattern)))
