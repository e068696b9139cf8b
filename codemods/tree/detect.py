"""Which dialect a tree's plans use: that of its version file's release, else the newest one that has all their styles.

The names in one file cannot tell dialects apart, so the styles of the whole tree are considered together.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from codemods.files.sources import format_path, read_source
from plans.dialect import PARAM_LEVEL, Dialect, dialect_for_release, dialect_names, load_dialect
from plans.errors import UsageError

__all__ = ["DetectedDialect", "detect_dialect", "find_version_file", "load_source_dialect"]

_VERSION = re.compile(rb"^__version__\s*=\s*[\"'](\d+\.\d+[\w.+-]*)[\"']", re.MULTILINE)
_PACKAGE = "transformers"


@dataclass(frozen=True)
class DetectedDialect:
    """A tree's dialect.

    Args:
        dialect: the dialect's name.
        reason: how it was detected, in words.
        alternatives: other dialects that have the same styles but give one a different meaning, newest first.
    """

    dialect: str
    reason: str
    alternatives: tuple[str, ...] = ()


def detect_dialect(root: Path, styles: Iterable[str]) -> DetectedDialect:
    """Detect the dialect of a tree.

    Args:
        root: the tree's folder, or a file or folder in it.
        styles: the styles that the tree's plans use.

    Raises:
        UsageError: the version file names a release older than every known dialect.
        SourceError: the version file cannot be read.
    """
    used = _filter_distinctive(styles)
    versioned = _find_version(root)
    if versioned is None:
        return _detect_by_styles(used, "no version file found; ")
    file, version = versioned
    try:
        released = dialect_for_release(version)
    except UsageError as error:
        hint = "set `source` to the dialect of its plans"
        raise UsageError(f"{format_path(file)}: {error.message}", hint=hint, path=str(file), version=version) from error
    says = f"{format_path(file)} says {version}"
    missing = used - released.styles.keys()
    best = _detect_by_styles(used, f"{says}, which has no {_join_names(missing)}; ")
    # One style that the release lacks is a mistake in a plan, which must not change the dialect of the whole tree.
    if len(missing) <= max(1, len(used - load_dialect(best.dialect).styles.keys())):
        return DetectedDialect(released.name, says)
    return best


def load_source_dialect(name: str) -> Dialect:
    """Return the dialect that a user has named for a tree.

    Raises:
        UsageError: the dialect does not exist, or no tree can use it alone.
    """
    names = [known for known in dialect_names() if known != PARAM_LEVEL]
    if name == PARAM_LEVEL:
        raise UsageError(
            f"no tree uses {PARAM_LEVEL} alone: its styles are valid in every dialect, beside that dialect's own",
            hint=f"use auto, or the tree's own dialect: {', '.join(names)}",
            name=name,
        )
    return load_dialect(name)


def find_version_file(path: Path) -> Path | None:
    """Return the file that gives the release of the tree around a path, None if there is none."""
    versioned = _find_version(path)
    return versioned[0] if versioned else None


def _filter_distinctive(styles: Iterable[str]) -> frozenset[str]:
    """Return the styles that tell dialects apart: neither valid in every dialect nor unknown to all of them."""
    known = {name for dialect in _load_dialects() for name in dialect.styles}
    return frozenset(styles) & (known - load_dialect(PARAM_LEVEL).styles.keys())


def _detect_by_styles(used: frozenset[str], why: str) -> DetectedDialect:
    """Return the newest dialect that has all styles; if none does, the newest of those that lack the fewest."""
    missing = {dialect.name: len(used - dialect.styles.keys()) for dialect in _load_dialects()}
    fewest = min(missing.values())
    fitting = [dialect for dialect in _load_dialects() if missing[dialect.name] == fewest]
    newest = fitting[-1]
    others = [dialect.name for dialect in reversed(fitting[:-1]) if _has_different_meaning(dialect, newest, used)]
    missed = f" except {_join_names(used - newest.styles.keys())}" if fewest else ""
    reason = f"{why}{newest.name} is the newest dialect with all styles of its plans{missed}"
    if others:
        reason += f"; {_join_names(others)} would fit too"
    return DetectedDialect(newest.name, reason, tuple(others))


def _has_different_meaning(one: Dialect, other: Dialect, used: frozenset[str]) -> bool:
    """Return whether two dialects give different meanings to a style that both have."""
    shared = used & one.styles.keys() & other.styles.keys()
    return any(one.styles[name].means != other.styles[name].means for name in shared)


def _load_dialects() -> list[Dialect]:
    """Return every dialect that a tree can use, oldest first; stages of the branch come before releases."""
    loaded = [load_dialect(name) for name in dialect_names() if name != PARAM_LEVEL]
    return sorted(loaded, key=lambda dialect: dialect.sort_key)


def _find_version(root: Path) -> tuple[Path, str] | None:
    for file in _list_version_files(root.absolute()):
        if file.is_file() and (match := _VERSION.search(read_source(file).data)):
            return file, match[1].decode()
    return None


def _list_version_files(root: Path) -> Iterator[Path]:
    """Yield the files that may hold the version: above a path in the package, or below a repository's root."""
    yield from (folder / "__init__.py" for folder in (root, *root.parents) if folder.name == _PACKAGE)
    yield from (root / below / _PACKAGE / "__init__.py" for below in ("src", "."))


def _join_names(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
