"""The paths of one run grouped by project: each project has its own configuration, repository and dialect."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from codemods.files.config import find_project_file, make_absolute
from codemods.tree.release import find_version_file
from codemods.tree.survey import is_model_path

__all__ = ["group_by_project"]

_Project = tuple[Path | None, Path | None]
"""The nearest pyproject.toml, and the root of the repository."""


def group_by_project(paths: Sequence[Path]) -> list[tuple[Path, ...]]:
    """Group paths by project, in the given order.

    Paths of one project share the nearest pyproject.toml, the git repository, and the version file that tells their
    tree's dialect; a path without a version file joins the others. A path inside another one joins that one. Models in
    one folder of one repository stay together even if some have a pyproject.toml of their own, because a plan and its
    copies are edited together; then the outermost pyproject.toml applies, and its paths come first.
    """
    if len(paths) < 2:
        return [tuple(paths)]
    given = {path.resolve(): path for path in paths}
    outermost = {path: _find_outermost(path, given.keys()) for path in given}
    own = {path: _find_project(path, given[path]) for path in outermost.values()}
    homes = _merge_siblings(own)
    versions = {path: find_version_file(path) for path in homes}
    first: dict[_Project, Path | None] = {}
    for path, home in homes.items():
        first[home] = first.get(home) or versions[path]
    groups: dict[tuple[_Project, Path | None], list[Path]] = {}
    for path in sorted(paths, key=lambda path: own[outermost[path.resolve()]] != homes[outermost[path.resolve()]]):
        outer = outermost[path.resolve()]
        groups.setdefault((homes[outer], versions[outer] or first[homes[outer]]), []).append(path)
    return [tuple(group) for group in groups.values()]


def _merge_siblings(projects: Mapping[Path, _Project]) -> dict[Path, _Project]:
    """Assign the models in one folder of one repository to one project: the outermost of theirs."""
    siblings: dict[tuple[Path, Path | None], list[Path]] = {}
    for path, (project, repository) in projects.items():
        if project != path:  # otherwise only a link leads to it
            siblings.setdefault((path.parent if path.is_dir() else path.parent.parent, repository), []).append(path)
    shared = dict(projects)
    for models in siblings.values():
        if len(models) > 1 and all(map(is_model_path, models)):
            home = min((projects[path] for path in models), key=_depth)
            shared |= dict.fromkeys(models, home)
    return shared


def _depth(project: _Project) -> tuple[bool, int]:
    return project[0] is None, len(project[0].parts) if project[0] else 0


def _find_outermost(path: Path, known: Container[Path]) -> Path:
    """Return the outermost of the known paths that contains a path."""
    return [parent for parent in (path, *path.parents) if parent in known][-1]


def _find_project(path: Path, given: Path) -> _Project:
    """Return the project of a path; a path that only a link from some project leads to is a project of its own."""
    home = _find_folder_project(path if path.is_dir() else path.parent)
    if home[0] is None and find_project_file(make_absolute(given)):
        return path, home[1]
    return home


@lru_cache(maxsize=4096)
def _find_folder_project(folder: Path) -> _Project:
    folders = (folder, *folder.parents)
    return find_project_file(folder), next((parent for parent in folders if (parent / ".git").exists()), None)
