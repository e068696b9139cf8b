"""Running git to list and read files, without changing anything and without starting other programs."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from codemods.files.sources import format_path
from plans.errors import DependencyError, SourceError, UsageError

__all__ = ["Git", "find_changed_folders", "list_changed_files"]

# A repository's settings can make git start programs. None of them is needed to list and read files.
_GIT = ("git", "-c", "core.fsmonitor=false", "-c", "core.untrackedCache=false", "--literal-pathspecs")
_ENVIRONMENT = {"GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"}
_DIFF_OPTIONS = ("--name-only", "-z", "--no-renames", "--no-ext-diff", "--no-textconv")


@dataclass(frozen=True)
class Git:
    """The git commands that one feature runs. Each method raises a `DependencyError` if git is not installed.

    Args:
        needed_by: the feature, for the error message if git is not installed.
        outside_hint: what to do if a folder is not in a repository.
        revision_hint: what to do if a revision does not exist.
        install_hint: what to do if git is not installed.
    """

    needed_by: str
    outside_hint: str
    revision_hint: str
    install_hint: str = "install git"

    def run(self, folder: Path, *arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        """Run git in an existing folder and return the completed process, whatever its exit code."""
        command, environment = [*_GIT, *arguments], os.environ | _ENVIRONMENT
        try:
            return subprocess.run(command, cwd=folder, input=stdin, env=environment, capture_output=True, check=False)
        except FileNotFoundError as error:
            raise DependencyError(
                f"{self.needed_by} needs git, which is not installed", hint=self.install_hint, packages=["git"]
            ) from error

    def read(self, folder: Path, *arguments: str, stdin: bytes = b"") -> bytes:
        """Return the output of a git command.

        Raises:
            SourceError: the command failed.
        """
        completed = self.run(folder, *arguments, stdin=stdin)
        if completed.returncode:
            raise SourceError(
                f"{format_path(folder)}: git {arguments[0]} failed: {_read_reason(completed)}",
                hint="run `git fsck` to see what is wrong with the repository",
                path=str(folder),
            )
        return completed.stdout

    def find_root(self, folder: Path) -> Path:
        """Return the top folder of the repository that a folder is in.

        Raises:
            UsageError: the folder is not in a repository.
        """
        completed = self.run(folder, "rev-parse", "--show-toplevel")
        if completed.returncode:
            raise UsageError(
                f"{format_path(folder.absolute())}: {_read_reason(completed)}", hint=self.outside_hint, path=str(folder)
            )
        return Path(os.fsdecode(completed.stdout.removesuffix(b"\n")))

    def resolve_commit(self, root: Path, name: str) -> str:
        """Return the id of the commit that a branch, a tag or another revision leads to.

        Raises:
            UsageError: there is no such commit.
        """
        completed = self.run(root, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}")
        if completed.returncode:
            raise UsageError(
                f"{format_path(root)}: there is no commit, branch or tag {name!r}",
                hint=self.revision_hint,
                revision=name,
                path=str(root),
            )
        return completed.stdout.decode().strip()


def _read_reason(completed: subprocess.CompletedProcess[bytes]) -> str:
    """Return the reason that git gave for a failure."""
    lines = completed.stderr.decode("utf-8", "replace").strip().splitlines()
    return lines[0].removeprefix("fatal: ") if lines else "git gave no reason"


_CHANGED_ONLY = Git(
    "`changed_only`",
    outside_hint="`changed_only` needs a git repository; leave it out to read every file",
    revision_hint="fetch it first (actions/checkout needs fetch-depth: 0), or name another with `base_ref`",
    install_hint="install git, or leave `changed_only` out",
)


def list_changed_files(base_ref: str, folder: Path) -> frozenset[Path]:
    """Return the files that differ from the merge base of HEAD and `base_ref`, including deleted and untracked ones.

    Args:
        base_ref: a branch, tag or commit.
        folder: any folder of the repository.

    Raises:
        UsageError: the folder is not in a repository, or the commit does not exist or shares no history with HEAD.
        SourceError: the repository cannot be read.
        DependencyError: git is not installed.
    """
    git = _CHANGED_ONLY
    root = git.find_root(folder)
    merge_base = git.run(root, "merge-base", git.resolve_commit(root, base_ref), "HEAD")
    if merge_base.returncode:
        raise UsageError(
            f"{format_path(root)}: HEAD and {base_ref!r} have no commit in common",
            hint=git.revision_hint,
            revision=base_ref,
            path=str(root),
        )
    listed = git.read(root, "diff", *_DIFF_OPTIONS, merge_base.stdout.decode().strip(), "--")
    listed += git.read(root, "ls-files", "--others", "--exclude-standard", "-z")
    return frozenset(root / os.fsdecode(name) for name in listed.split(b"\0") if name)


def find_changed_folders(files: frozenset[Path]) -> frozenset[Path]:
    """Return the folders with changed Python files: a plan depends on the modeling and modular files in its folder."""
    return frozenset(path.parent.resolve() for path in files if path.suffix == ".py")
