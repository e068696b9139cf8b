"""git, run for lists of names and contents of files: it changes nothing and starts no other program."""

from __future__ import annotations

import os
import subprocess
from functools import partial
from pathlib import Path

from codemods.files.sources import format_path
from plans.errors import DependencyError, UsageError

__all__ = ["find_changed_folders", "get_failure_reason", "list_changed_files", "run_git"]


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


_try_git = partial(run_git, needed_by="`changed_only`", hint="install git, or leave `changed_only` out")
_DIFF_OPTIONS = ("--name-only", "-z", "--no-renames", "--no-ext-diff", "--no-textconv")


def list_changed_files(base_ref: str, folder: Path) -> frozenset[Path]:
    """Return every file that differs from the commit where HEAD left `base_ref`, deleted and untracked ones included.

    Args:
        base_ref: a branch, tag or commit.
        folder: any folder of the repository.

    Raises:
        UsageError: the folder is in no repository, or git knows no such commit or no common history.
        DependencyError: git is not installed.
    """
    root = Path(os.fsdecode(_read_git(folder, "rev-parse", "--show-toplevel").rstrip(b"\n")))
    base = _find_merge_base(root, base_ref)
    listed = _read_git(root, "diff", *_DIFF_OPTIONS, base, "--") + _read_git(
        root, "ls-files", "--others", "--exclude-standard", "-z"
    )
    return frozenset(root / os.fsdecode(name) for name in listed.split(b"\0") if name)


def find_changed_folders(files: frozenset[Path]) -> frozenset[Path]:
    """Return the folders whose Python files changed: a plan depends on the modeling and modular files beside it."""
    return frozenset(path.parent.resolve() for path in files if path.suffix == ".py")


def _find_merge_base(root: Path, base_ref: str) -> str:
    fetch = "fetch it first (actions/checkout needs fetch-depth: 0), or name another with `base_ref`"
    commit = _try_git(root, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{base_ref}^{{commit}}")
    if commit.returncode:
        raise UsageError(
            f"{format_path(root)}: git knows no commit {base_ref!r}", hint=fetch, ref=base_ref, path=str(root)
        )
    base = _try_git(root, "merge-base", commit.stdout.decode().strip(), "HEAD")
    if base.returncode:
        raise UsageError(
            f"{format_path(root)}: HEAD and {base_ref!r} have no commit in common",
            hint=fetch,
            ref=base_ref,
            path=str(root),
        )
    return base.stdout.decode().strip()


def _read_git(folder: Path, *arguments: str) -> bytes:
    done = _try_git(folder, *arguments)
    if done.returncode:
        raise UsageError(
            f"{format_path(folder)}: {get_failure_reason(done)}",
            hint="`changed_only` needs a git repository; leave it out to look at every file",
            path=str(folder),
        )
    return done.stdout
