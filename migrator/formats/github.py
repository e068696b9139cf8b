"""For GitHub Actions: workflow commands that show each finding on its line of a pull request."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from codemods.tree.outcome import Located
from migrator.formats.report import Report
from plans.errors import MigratorError
from plans.rule import rule

__all__ = ["github_lines", "workflow_command"]

_COMMANDS = {"note": "notice", "warning": "warning", "error": "error"}
_DATA = str.maketrans({"%": "%25", "\r": "%0D", "\n": "%0A"})
_PROPERTY = _DATA | str.maketrans({":": "%3A", ",": "%2C"})


def github_lines(report: Report) -> Iterator[str]:
    """Yield a workflow command for each pending edit, finding and error; paths count from the workspace."""
    root = Path(os.environ.get("GITHUB_WORKSPACE") or Path.cwd())
    for found in report.everything:
        yield _finding(found, root)
    for error in report.errors:
        yield _error(error, root)


def _finding(found: Located, root: Path) -> str:
    title = f"{found.finding.code} {rule(found.finding.code).name}"
    message = f"{found.finding.message}\n{found.finding.hint}"
    properties = {"file": _relative(found.path, root), "line": str(found.line), "title": title}
    return workflow_command(_COMMANDS[found.finding.severity], properties, message)


def _error(error: MigratorError, root: Path) -> str:
    path, line = error.data.get("path"), error.data.get("line")
    properties = {"file": _relative(Path(str(path)), root)} if path else {}
    properties |= {"line": str(line)} if line else {}
    return workflow_command("error", {**properties, "title": type(error).__name__}, f"{error.message}\n{error.hint}")


def workflow_command(name: str, properties: dict[str, str], message: str) -> str:
    """Return one workflow command, with GitHub's escaping."""
    written = ",".join(f"{key}={value.translate(_PROPERTY)}" for key, value in properties.items())
    return f"::{name} {written}::{message.translate(_DATA)}"


def _relative(path: Path, root: Path) -> str:
    return (path.relative_to(root) if path.is_relative_to(root) else path).as_posix()
