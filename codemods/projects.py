"""Paths of one run sorted by the projects they belong to: each has its own configuration, repository and dialect."""

from __future__ import annotations

from collections.abc import Container, Sequence
from functools import lru_cache
from pathlib import Path

from codemods.config import absolute, find_project_file
from codemods.detect import version_file

__all__ = ["by_project"]

_Home = tuple[Path | None, Path | None]
"""The nearest pyproject.toml and the root of the repository."""


def by_project(paths: Sequence[Path]) -> list[tuple[Path, ...]]:
    """Group paths by project, in the order given.

    Paths of one project share the nearest pyproject.toml, the git repository, and the version file that says what their
    tree speaks; one that no version file speaks of goes with the others. A path inside another one goes with that.
    """
    if len(paths) < 2:
        return [tuple(paths)]
    given = {path.resolve(): path for path in paths}
    outermost = {path: _outermost(path, given.keys()) for path in given}
    homes = {path: _home(path, given[path]) for path in outermost.values()}
    versions = {path: version_file(path) for path in homes}
    first: dict[_Home, Path | None] = {}
    for path, home in homes.items():
        first[home] = first.get(home) or versions[path]
    groups: dict[tuple[_Home, Path | None], list[Path]] = {}
    for path in paths:
        outer = outermost[path.resolve()]
        groups.setdefault((homes[outer], versions[outer] or first[homes[outer]]), []).append(path)
    return [tuple(group) for group in groups.values()]


def _outermost(path: Path, known: Container[Path]) -> Path:
    """Return the outermost of the known paths that holds one of them."""
    return [above for above in (path, *path.parents) if above in known][-1]


def _home(path: Path, given: Path) -> _Home:
    """Return where a path belongs; one that only a link from some project leads to is a project of its own."""
    home = _home_of_folder(path if path.is_dir() else path.parent)
    if home[0] is None and find_project_file(absolute(given)):
        return path, home[1]
    return home


@lru_cache(maxsize=4096)
def _home_of_folder(folder: Path) -> _Home:
    above = (folder, *folder.parents)
    return find_project_file(folder), next((one for one in above if (one / ".git").exists()), None)
