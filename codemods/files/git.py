"""git, run for lists of names and contents of files: it changes nothing and starts no other program."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from plans.errors import DependencyError

__all__ = ["get_failure_reason", "run_git"]

# A repository's own settings can name programs for git to start; none is needed to list and read files.
_GIT = ("git", "-c", "core.fsmonitor=false", "-c", "core.untrackedCache=false", "--literal-pathspecs")
_ENVIRONMENT = {"GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"}


def run_git(
    folder: Path, *arguments: str, needed_by: str, hint: str = "install git", stdin: bytes = b""
) -> subprocess.CompletedProcess[bytes]:
    """Run git in a folder, whatever its exit code.

    Args:
        folder: that exists.
        arguments: of the command line.
        needed_by: what cannot be done without git, in words.
        hint: what to do about that.
        stdin: what git reads.

    Raises:
        DependencyError: git is not installed.
    """
    command, environment = [*_GIT, *arguments], os.environ | _ENVIRONMENT
    try:
        return subprocess.run(command, cwd=folder, input=stdin, env=environment, capture_output=True, check=False)
    except FileNotFoundError as error:
        raise DependencyError(f"{needed_by} needs git, which is not installed", hint=hint, packages=["git"]) from error


def get_failure_reason(completed: subprocess.CompletedProcess[bytes]) -> str:
    """Return why git failed, in its own words."""
    lines = completed.stderr.decode("utf-8", "replace").strip().splitlines()
    return lines[0].removeprefix("fatal: ") if lines else "no reason given"
