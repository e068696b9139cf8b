"""Paths of one run sorted by the projects they belong to: each has its own configuration, repository and dialect."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from codemods.files.config import absolute, find_project_file
from codemods.tree.detect import version_file
from codemods.tree.survey import is_model_path

__all__ = ["by_project"]

_Home = tuple[Path | None, Path | None]
"""The nearest pyproject.toml and the root of the repository."""


def by_project(paths: Sequence[Path]) -> list[tuple[Path, ...]]:
    """Group paths by project, in the order given.

    Paths of one project share the nearest pyproject.toml, the git repository, and the version file that says what their
    tree speaks; one that no version file speaks of goes with the others. A path inside another one goes with that, and
    models of one folder and one repository go together, a pyproject.toml among their files or not: a plan and its
    copies are edited together. Then the outermost pyproject.toml counts, and its paths come first.
    """
    if len(paths) < 2:
        return [tuple(paths)]
    given = {path.resolve(): path for path in paths}
    outermost = {path: _outermost(path, given.keys()) for path in given}
    own = {path: _home(path, given[path]) for path in outermost.values()}
    homes = _with_siblings(own)
    versions = {path: version_file(path) for path in homes}
    first: dict[_Home, Path | None] = {}
    for path, home in homes.items():
        first[home] = first.get(home) or versions[path]
    groups: dict[tuple[_Home, Path | None], list[Path]] = {}
    for path in sorted(paths, key=lambda path: own[outermost[path.resolve()]] != homes[outermost[path.resolve()]]):
        outer = outermost[path.resolve()]
        groups.setdefault((homes[outer], versions[outer] or first[homes[outer]]), []).append(path)
    return [tuple(group) for group in groups.values()]


def _with_siblings(homes: Mapping[Path, _Home]) -> dict[Path, _Home]:
    """Give the models that lie in one folder of one repository one home: the outermost of theirs."""
    beside: dict[tuple[Path, Path | None], list[Path]] = {}
    for path, (project, repository) in homes.items():
        if project != path:  # one that only a link leads to
            beside.setdefault((path.parent if path.is_dir() else path.parent.parent, repository), []).append(path)
    shared = dict(homes)
    for models in beside.values():
        if len(models) > 1 and all(map(is_model_path, models)):
            home = min((homes[path] for path in models), key=_depth)
            shared |= dict.fromkeys(models, home)
    return shared


def _depth(home: _Home) -> tuple[bool, int]:
    return home[0] is None, len(home[0].parts) if home[0] else 0


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
