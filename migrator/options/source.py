"""What the commands that read source share: their options, and the project configuration that completes them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from migrator.options.common import format_option
from migrator.terminal import console
from plans.errors import MigratorError, UsageError

if TYPE_CHECKING:
    from codemods.tree.selection import Selection
    from migrator.formats.report import SourceReport

__all__ = [
    "ProjectRequest",
    "emit_machine_format",
    "print_errors",
    "read_requests",
    "source_options",
]

_DEFAULT_BASE = "origin/main"
_ANY_SOURCE = "auto"
_DIALECT = "NAME|FILE.toml"

_Command = Callable[..., Any]


@dataclass(frozen=True)
class ProjectRequest:
    """The part of a command's work that lies in one project.

    Args:
        paths: the files and folders to read.
        selection: decides which findings in them are in scope.
        source: the dialect of the tree's plans, `auto` to detect it.
        target: the dialect to rewrite to.
    """

    paths: tuple[Path, ...]
    selection: Selection
    source: str
    target: str


def source_options(command: _Command) -> _Command:
    """Add the arguments and options that `read_requests` takes, `--format` and `--quiet`."""
    for decorator in (
        click.option("--quiet", "-q", is_flag=True, help="Print errors only."),
        format_option("human", "json", "github", "sarif"),
        click.option(
            "--base-ref", metavar="REF", help=f"The git revision for --changed-only; by default {_DEFAULT_BASE}."
        ),
        click.option("--target", metavar=_DIALECT, help="The dialect to rewrite to; by default param-level."),
        click.option("--source", metavar=_DIALECT, help="The dialect of the tree's plans; by default it is detected."),
        click.option("--changed-only", is_flag=True, help="Only models with a file that changed since --base-ref."),
        click.argument("paths", nargs=-1, type=click.Path(path_type=Path)),
    ):
        command = decorator(command)
    return command


def read_requests(
    paths: Sequence[Path],
    *,
    changed_only: bool,
    base_ref: str | None,
    source: str | None = None,
    target: str | None = None,
) -> list[ProjectRequest]:
    """Combine the command line with each project's pyproject.toml; the command line takes precedence.

    Args:
        paths: the paths from the command line.
        changed_only: restrict the findings to models with a changed file.
        base_ref: the git revision that `changed_only` compares with.
        source: the dialect of the tree's plans, None for the project's setting.
        target: the dialect to rewrite to, None for the project's setting.

    Raises:
        UsageError: the configuration is not valid, the options contradict each other, or a path is neither a Python
            file nor a folder that contains one.
    """
    from codemods.tree.projects import group_by_project

    if base_ref and not changed_only:
        raise UsageError("--base-ref needs --changed-only", hint="add --changed-only or leave --base-ref out")
    compared = (base_ref or _DEFAULT_BASE) if changed_only else None
    return [_resolve_request(group, compared, source, target) for group in group_by_project(paths)]


def _resolve_request(
    paths: tuple[Path, ...], base_ref: str | None, source: str | None, target: str | None
) -> ProjectRequest:
    """Return the request for one project; without paths, for the project around the current folder."""
    from codemods.files.config import find_configuration
    from codemods.tree.selection import Selection
    from plans.dialect import PARAM_LEVEL

    start = paths[0] if paths else Path()
    configuration = find_configuration(start)
    paths = paths or configuration.paths or (Path(),)
    for path in paths:
        _check_has_python(path)
    return ProjectRequest(
        paths,
        Selection(configuration, _find_changed_folders(start, base_ref) if base_ref else None),
        source=source or configuration.source or _ANY_SOURCE,
        target=target or configuration.target or PARAM_LEVEL,
    )


def _check_has_python(path: Path) -> None:
    """Refuse a path without Python files; a path that does not exist is refused later, when it is read."""
    is_other_file = path.is_file() and path.suffix != ".py"
    if is_other_file or (path.is_dir() and not _has_python(path)):
        raise UsageError(
            f"{path}: {'not a Python file' if is_other_file else 'no Python file below this folder'}",
            hint="name .py files, or folders that contain some",
            path=str(path),
        )


def _has_python(folder: Path) -> bool:
    """Return whether there is a Python file below a folder, or a folder that cannot be listed, which fails later."""
    unreadable: list[OSError] = []
    for _, folders, files in os.walk(folder, onerror=unreadable.append):
        folders[:] = [name for name in folders if not name.startswith(".")]
        if any(name.endswith(".py") and not name.startswith(".") for name in files):
            return True
    return bool(unreadable)


def emit_machine_format(report: SourceReport, output_format: str) -> None:
    """Print a report as json, github or sarif."""
    if output_format == "json":
        from migrator.formats.json import report_as_json

        console.emit_json(report_as_json(report))
    elif output_format == "github":
        from migrator.formats.github import github_lines

        for line in github_lines(report):
            console.emit(line)
    else:
        from importlib.metadata import version

        from migrator.formats.sarif import report_as_sarif

        console.emit_json(report_as_sarif(report, version("plan-migrator")))


def print_errors(errors: Sequence[MigratorError]) -> None:
    """Print each error with its hint."""
    for error in errors:
        console.error(error)


def _find_changed_folders(start: Path, base_ref: str) -> frozenset[Path]:
    from codemods.files.git import find_changed_folders, list_changed_files

    start = start.absolute()
    if not start.exists():
        raise UsageError(f"{start}: no such file or folder", hint="name files or folders that exist", path=str(start))
    return find_changed_folders(list_changed_files(base_ref, start if start.is_dir() else start.parent))
