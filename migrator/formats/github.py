"""GitHub Actions workflow commands, which show each finding on its line of a pull request."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from codemods.tree.outcome import LocatedFinding
from migrator.formats.report import SourceReport
from plans.errors import MigratorError
from plans.rule import load_rule

__all__ = ["format_workflow_command", "github_lines"]

_COMMANDS = {"note": "notice", "warning": "warning", "error": "error"}
_DATA_ESCAPES = str.maketrans({"%": "%25", "\r": "%0D", "\n": "%0A"})
_PROPERTY_ESCAPES = _DATA_ESCAPES | str.maketrans({":": "%3A", ",": "%2C"})


def github_lines(report: SourceReport) -> Iterator[str]:
    """Yield a workflow command for each pending edit, finding and error; paths are relative to the workspace."""
    root = Path(os.environ.get("GITHUB_WORKSPACE") or Path.cwd())
    for located in report.all_findings:
        yield _format_finding(located, root)
    for error in report.errors:
        yield _format_error(error, root)


def _format_finding(located: LocatedFinding, root: Path) -> str:
    title = f"{located.finding.code} {load_rule(located.finding.code).name}"
    message = f"{located.finding.message}\n{located.finding.hint}"
    properties = {"file": _relative_path(located.path, root), "line": str(located.line), "title": title}
    return format_workflow_command(_COMMANDS[located.finding.severity], properties, message)


def _format_error(error: MigratorError, root: Path) -> str:
    path, line = error.data.get("path"), error.data.get("line")
    properties = {"file": _relative_path(Path(str(path)), root)} if path else {}
    properties |= {"line": str(line)} if line else {}
    return format_workflow_command(
        "error", {**properties, "title": type(error).__name__}, f"{error.message}\n{error.hint}"
    )


def format_workflow_command(name: str, properties: dict[str, str], message: str) -> str:
    """Return a workflow command with GitHub's escaping."""
    pairs = ",".join(f"{key}={value.translate(_PROPERTY_ESCAPES)}" for key, value in properties.items())
    return f"::{name} {pairs}::{message.translate(_DATA_ESCAPES)}"


def _relative_path(path: Path, root: Path) -> str:
    return (path.relative_to(root) if path.is_relative_to(root) else path).as_posix()
