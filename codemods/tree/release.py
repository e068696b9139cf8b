"""A tree's release: its version file, and what a release has that no known dialect describes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from codemods.files.sources import format_path, read_source
from codemods.tree.registry import Place
from codemods.tree.version_file import VERSION_NAME, read_version
from plans.dialect import Dialect, dialect_for_release, is_newer_than_all
from plans.errors import UsageError

__all__ = [
    "NEWER_THAN_ALL",
    "UnknownRelease",
    "VersionFile",
    "find_dialect_of_version",
    "find_unread_version",
    "find_version",
    "find_version_file",
    "is_newer",
    "refuse_version",
]

NEWER_THAN_ALL = "newer than every known dialect"

_PACKAGE = "transformers"

VersionFile = tuple[Path, str]
"""A version file and the version that it gives."""


@dataclass(frozen=True)
class UnknownRelease:
    """What a tree's release has that no known dialect describes.

    Args:
        name: the release in words, such as `transformers 6.1.0, newer than every known dialect`.
        read_as: the dialect that the tree is read as.
        styles: the registered names that the dialect does not have, with the places that register them.
        known: the styles of that dialect, param-level ones included.
        is_complete: whether every registered name could be read.
    """

    name: str
    read_as: str
    styles: Mapping[str, Place]
    known: frozenset[str]
    is_complete: bool

    def is_unknown(self, style: str) -> bool:
        """Return whether it is not known what a style does; one that no complete registry has does not exist."""
        return style in self.styles or not (self.is_complete or style in self.known)


def find_version_file(path: Path) -> Path | None:
    """Return the file that gives the release of the tree around a path, None if there is none."""
    versioned = find_version(path)
    return versioned[0] if versioned else None


def find_dialect_of_version(versioned: VersionFile | None) -> Dialect | None:
    """Return the dialect of a version file's release, None without one or if the release is older than all."""
    try:
        return dialect_for_release(versioned[1]) if versioned else None
    except UsageError:
        return None


def is_newer(versioned: VersionFile | None) -> bool:
    """Return whether a version file gives a release that is newer than every known dialect."""
    return versioned is not None and is_newer_than_all(versioned[1])


def refuse_version(versioned: VersionFile) -> NoReturn:
    """Refuse a release that is older than every known dialect.

    Raises:
        UsageError: always.
    """
    file, version = versioned
    raise UsageError(
        f"{format_path(file)}: transformers {version} is older than every known dialect",
        hint="set `source` to the dialect of its plans",
        path=str(file),
        version=version,
    )


def find_version(root: Path) -> VersionFile | None:
    """Return the version file of the tree around a path with its version, None if there is none that can be read."""
    versions = ((file, read_version(file)) for file in _list_version_files(root.absolute()) if file.is_file())
    return next(((file, version) for file, version in versions if version), None)


def find_unread_version(root: Path) -> Path | None:
    """Return a file that sets the version of the tree around a path in a way that cannot be read, None without one."""
    files = (file for file in _list_version_files(root.absolute()) if file.is_file())
    return next((file for file in files if VERSION_NAME in read_source(file).data and not read_version(file)), None)


def _list_version_files(root: Path) -> Iterator[Path]:
    """Yield the files that may hold the version: above a path in the package, or below a repository's root."""
    yield from (folder / "__init__.py" for folder in (root, *root.parents) if folder.name == _PACKAGE)
    yield from (root / below / _PACKAGE / "__init__.py" for below in ("src", "."))
