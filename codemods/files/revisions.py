"""The source files of git revisions, read with git's plumbing commands: no checkout, and no hooks run."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from codemods.files.git import Git
from codemods.files.sources import SourceFile, read_source
from plans.errors import SourceError

__all__ = ["Repository", "Snapshot", "find_changed_paths", "find_repository"]

_GIT = Git(
    "comparing revisions",
    outside_hint="run the command in the repository whose revisions you compare",
    revision_hint="run `git log` to see the commits that exist; fetch those of another repository first",
)
_REGULAR_FILES = frozenset({b"100644", b"100755"})
_MAX_BYTES = 16 << 20


@dataclass
class Repository:
    """A git repository; each blob is read at most once.

    Args:
        root: the top folder of the repository.
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
        commit = _GIT.resolve_commit(self.root, name)
        listed = _GIT.read(self.root, "ls-tree", "-r", "-z", "--full-tree", commit)
        return Snapshot(self, name, dict(_parse_tree(listed)))

    def read_working_tree(self) -> Snapshot:
        """Return the Python files of the working tree, including untracked ones but not ignored ones."""
        blobs = dict(_parse_index(_GIT.read(self.root, "ls-files", "--stage", "-z")))
        changed = _parse_python_paths(_GIT.read(self.root, "diff-files", "--name-only", "-z"))
        untracked = _parse_python_paths(_GIT.read(self.root, "ls-files", "--others", "--exclude-standard", "-z"))
        for path in (*changed, *untracked):
            if self._is_regular_file(path):
                blobs[path] = ""
            else:
                blobs.pop(path, None)
        return Snapshot(self, "the working tree", blobs)

    def prefetch(self, files: Iterable[tuple[Path, str]]) -> None:
        """Read several files with one git process, for later calls of `read_content`.

        Args:
            files: the paths with the ids of their blobs.

        Raises:
            SourceError: a file is missing in the repository, or is too large for a source file.
        """
        wanted = {blob: path for path, blob in files if blob and blob not in self._blobs}
        if not wanted:
            return
        stdin = "".join(f"{blob}\n" for blob in wanted).encode()
        sizes = _GIT.read(self.root, "cat-file", "--batch-check=%(objectname) %(objectsize)", stdin=stdin)
        for path, facts in zip(wanted.values(), sizes.decode().splitlines(), strict=True):
            _check_size(path, facts.split()[1])
        self._blobs |= _parse_batch(_GIT.read(self.root, "cat-file", "--batch", stdin=stdin), wanted)

    def read_content(self, path: Path, blob: str) -> bytes:
        """Return the content of a file by the id of its blob.

        Raises:
            SourceError: as for `prefetch`.
        """
        self.prefetch([(path, blob)])
        return self._blobs[blob]

    def _is_regular_file(self, path: Path) -> bool:
        """Return whether a path is a regular file of the working tree, not reached by a link that leads out of it."""
        absolute = self.root / path
        is_inside = absolute.parent.resolve().is_relative_to(self.root.resolve())
        return is_inside and absolute.is_file() and not absolute.is_symlink()


@dataclass(frozen=True)
class Snapshot:
    """The Python files of one revision, or of the working tree.

    Args:
        repository: the repository that it belongs to.
        name: the user's name for it.
        blobs: the paths relative to the repository with the ids of their blobs, empty for files that differ on disk.
    """

    repository: Repository
    name: str
    blobs: Mapping[Path, str]

    def source(self, path: Path) -> SourceFile | None:
        """Return a file, or None if the revision does not have it.

        Raises:
            SourceError: the file cannot be read.
        """
        blob = self.blobs.get(path)
        if blob is None:
            return None
        return SourceFile(
            path, self.repository.read_content(path, blob) if blob else read_source(self.repository.root / path).data
        )

    def prefetch(self, paths: Iterable[Path]) -> None:
        """Read several files with one git process, for later calls of `source`."""
        self.repository.prefetch((path, self.blobs.get(path, "")) for path in paths)


def find_repository(folder: Path) -> Repository:
    """Return the git repository that a folder is in.

    Raises:
        UsageError: the folder is not in a repository.
        DependencyError: git is not installed.
    """
    return Repository(_GIT.find_root(folder))


def find_changed_paths(before: Snapshot, after: Snapshot) -> frozenset[Path]:
    """Return the files that differ between two snapshots or exist in only one of them."""
    paths = before.blobs.keys() | after.blobs.keys()
    differing = [path for path in paths if before.blobs.get(path) != after.blobs.get(path)]
    before.prefetch(differing)
    after.prefetch(differing)
    return frozenset(path for path in differing if _read_content(before, path) != _read_content(after, path))


def _read_content(snapshot: Snapshot, path: Path) -> bytes | None:
    source = snapshot.source(path)
    return source.data if source else None


def _parse_tree(listed: bytes) -> Iterator[tuple[Path, str]]:
    """Read `MODE TYPE BLOB<tab>PATH` records, except for links and submodules."""
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
    """Return a path inside the repository; a forged tree object can name any path."""
    path = Path(os.fsdecode(name))
    if path.is_absolute() or ".." in path.parts:
        raise SourceError(
            f"git lists {str(path)!r}, which leads out of the repository",
            hint="run `git fsck` to see which tree object it comes from",
            path=str(path),
        )
    return path


def _check_size(path: Path, size: str) -> None:
    if size == "missing":
        raise SourceError(
            f"{path}: its content is missing in the repository",
            hint="if this is a shallow or partial clone, run `git fetch --refetch`",
            path=str(path),
        )
    if int(size) > _MAX_BYTES:
        raise SourceError(
            f"{path}: too large for a source file, {int(size):,} bytes",
            hint=f"split it, or leave its folder out of the comparison; {_MAX_BYTES:,} bytes are the most that is read",
            path=str(path),
        )


def _parse_batch(output: bytes, wanted: Iterable[str]) -> Iterator[tuple[str, bytes]]:
    """Read `BLOB TYPE SIZE<newline>CONTENT<newline>` records, in the order they were asked for."""
    start = 0
    for blob in wanted:
        end = output.index(b"\n", start)
        size = int(output[start:end].split()[2])
        yield blob, output[end + 1 : end + 1 + size]
        start = end + size + 2
