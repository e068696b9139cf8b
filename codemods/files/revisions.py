"""The source files of git revisions, read through git's plumbing: nothing is checked out and no hook is run."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from codemods.files.git import get_failure_reason, run_git
from codemods.files.sources import SourceFile, format_path, read_source
from plans.errors import SourceError, UsageError

__all__ = ["Repository", "Snapshot", "find_changed_paths", "find_repository"]

_run_git = partial(run_git, needed_by="comparing revisions")
_REGULAR_FILES = frozenset({b"100644", b"100755"})
_MAX_BYTES = 16 << 20


@dataclass
class Repository:
    """A git repository; each blob is read at most once.

    Args:
        root: its top folder.
    """

    root: Path
    _blobs: dict[str, bytes] = field(default_factory=dict)

    def read_revision(self, name: str) -> Snapshot:
        """Return the Python files of a revision.

        Args:
            name: a commit, branch or tag.

        Raises:
            UsageError: there is no such commit.
        """
        found = self._try_git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}")
        if found.returncode:
            raise UsageError(
                f"{format_path(self.root)}: git knows no revision {name!r}",
                hint="name a commit, branch or tag that `git log` shows; fetch it first if it is elsewhere",
                revision=name,
                path=str(self.root),
            )
        commit = found.stdout.decode().strip()
        listed = self._read_git("ls-tree", "-r", "-z", "--full-tree", commit)
        return Snapshot(self, name, dict(_parse_tree(listed)))

    def read_working_tree(self) -> Snapshot:
        """Return the Python files as they lie in the working tree, untracked ones included, ignored ones not."""
        blobs = dict(_parse_index(self._read_git("ls-files", "--stage", "-z")))
        touched = _parse_python_paths(self._read_git("diff-files", "--name-only", "-z"))
        untracked = _parse_python_paths(self._read_git("ls-files", "--others", "--exclude-standard", "-z"))
        for path in (*touched, *untracked):
            if self._is_regular_file(path):
                blobs[path] = ""
            else:
                blobs.pop(path, None)
        return Snapshot(self, "the working tree", blobs)

    def prefetch(self, files: Iterable[tuple[Path, str]]) -> None:
        """Read files that will be asked for, all at once.

        Args:
            files: paths with the ids of their contents.

        Raises:
            SourceError: the repository lacks one, or it is too large to be a source file.
        """
        wanted = {blob: path for path, blob in files if blob and blob not in self._blobs}
        if not wanted:
            return
        stdin = "".join(f"{blob}\n" for blob in wanted).encode()
        sizes = self._read_git("cat-file", "--batch-check=%(objectname) %(objectsize)", stdin=stdin)
        for path, facts in zip(wanted.values(), sizes.decode().splitlines(), strict=True):
            _check_size(path, facts.split()[1])
        self._blobs |= _parse_batch(self._read_git("cat-file", "--batch", stdin=stdin), wanted)

    def read_content(self, path: Path, blob: str) -> bytes:
        """Return a file by the id of its content.

        Raises:
            SourceError: as `load`.
        """
        self.prefetch([(path, blob)])
        return self._blobs[blob]

    def _is_regular_file(self, path: Path) -> bool:
        """Return whether a path of the working tree is a regular file, reached through no link that leads out."""
        absolute = self.root / path
        inside = absolute.parent.resolve().is_relative_to(self.root.resolve())
        return inside and absolute.is_file() and not absolute.is_symlink()

    def _read_git(self, *arguments: str, stdin: bytes = b"") -> bytes:
        done = self._try_git(*arguments, stdin=stdin)
        if done.returncode:
            raise SourceError(
                f"{format_path(self.root)}: git {arguments[0]} failed: {get_failure_reason(done)}",
                hint="`git fsck` tells what is wrong with the repository",
                path=str(self.root),
            )
        return done.stdout

    def _try_git(self, *arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        return _run_git(self.root, *arguments, stdin=stdin)


@dataclass(frozen=True)
class Snapshot:
    """The Python files of one revision, or of the working tree.

    Args:
        repository: where it comes from.
        name: as the user calls it.
        blobs: paths relative to the repository with the ids of their contents, empty for a file changed on disk.
    """

    repository: Repository
    name: str
    blobs: Mapping[Path, str]

    def source(self, path: Path) -> SourceFile | None:
        """Return a file, None if this revision does not have it.

        Raises:
            SourceError: it cannot be read.
        """
        blob = self.blobs.get(path)
        if blob is None:
            return None
        return SourceFile(
            path, self.repository.read_content(path, blob) if blob else read_source(self.repository.root / path).data
        )

    def prefetch(self, paths: Iterable[Path]) -> None:
        """Read files that will be asked for, all at once."""
        self.repository.prefetch((path, self.blobs.get(path, "")) for path in paths)


def find_repository(folder: Path) -> Repository:
    """Return the git repository that a folder lies in.

    Raises:
        UsageError: it lies in none.
        DependencyError: git is not installed.
    """
    done = _run_git(folder, "rev-parse", "--show-toplevel")
    if done.returncode:
        raise UsageError(
            f"{format_path(folder.absolute())}: {get_failure_reason(done)}",
            hint="run it inside the repository whose revisions you compare",
            path=str(folder),
        )
    return Repository(Path(os.fsdecode(done.stdout.removesuffix(b"\n"))))


def find_changed_paths(before: Snapshot, after: Snapshot) -> frozenset[Path]:
    """Return the files that differ between two snapshots, or that only one of them has."""
    paths = before.blobs.keys() | after.blobs.keys()
    differing = [path for path in paths if before.blobs.get(path) != after.blobs.get(path)]
    before.prefetch(differing)
    return frozenset(path for path in differing if _read_content(before, path) != _read_content(after, path))


def _read_content(snapshot: Snapshot, path: Path) -> bytes | None:
    source = snapshot.source(path)
    return source.data if source else None


def _parse_tree(listed: bytes) -> Iterator[tuple[Path, str]]:
    """Read `MODE TYPE BLOB<tab>PATH` records; links and submodules are no source files."""
    for record in filter(None, listed.split(b"\0")):
        facts, _, name = record.partition(b"\t")
        mode, _, blob = facts.split()
        if name.endswith(b".py") and mode in _REGULAR_FILES:
            yield _parse_path(name), blob.decode()


def _parse_index(listed: bytes) -> Iterator[tuple[Path, str]]:
    """Read `MODE BLOB STAGE<tab>PATH` records."""
    for record in filter(None, listed.split(b"\0")):
        facts, _, name = record.partition(b"\t")
        mode, blob, _ = facts.split()
        if name.endswith(b".py") and mode in _REGULAR_FILES:
            yield _parse_path(name), blob.decode()


def _parse_python_paths(listed: bytes) -> Iterator[Path]:
    for name in listed.split(b"\0"):
        if name.endswith(b".py"):
            yield _parse_path(name)


def _parse_path(name: bytes) -> Path:
    """Return a path inside the repository; a tree object can be made to name any."""
    path = Path(os.fsdecode(name))
    if path.is_absolute() or ".." in path.parts:
        raise SourceError(
            f"git lists {str(path)!r}, which leads out of the repository",
            hint="`git fsck` names the tree it comes from",
            path=str(path),
        )
    return path


def _check_size(path: Path, size: str) -> None:
    if size == "missing":
        raise SourceError(
            f"{path}: the repository lacks its content",
            hint="a shallow or partial clone may hold too little: `git fetch --refetch`",
            path=str(path),
        )
    if int(size) > _MAX_BYTES:
        raise SourceError(
            f"{path}: {int(size):,} bytes, too large for a source file",
            hint=f"files of more than {_MAX_BYTES:,} bytes are not read",
            path=str(path),
        )


def _parse_batch(output: bytes, wanted: Iterable[str]) -> Iterator[tuple[str, bytes]]:
    """Read `BLOB TYPE SIZE<newline>CONTENT<newline>` records, in the order they were asked for."""
    place = 0
    for blob in wanted:
        end = output.index(b"\n", place)
        size = int(output[place:end].split()[2])
        yield blob, output[end + 1 : end + 1 + size]
        place = end + size + 2
