"""A checkpoint's other files: what goes along as it is, and what is left behind, by name."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from plans.errors import CheckpointError, IncompleteError
from runtime.checkpoint.files.file_names import MANIFEST, MARKER

__all__ = ["WEIGHT_SUFFIXES", "SideFiles", "check_contained", "find_side_files", "walk_files"]

WEIGHT_SUFFIXES = frozenset(
    (".bin", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".pt", ".pth", ".pkl", ".pickle", ".safetensors")
)
"""How the names of weight files end, in any format."""


@dataclass(frozen=True)
class SideFiles:
    """Names of files relative to the checkpoint's folder, `/` between their parts.

    Args:
        copied: regular files that go along unchanged.
        left_behind: weights that are not the checkpoint's, hidden folders, and what is no regular file.
    """

    copied: tuple[str, ...] = ()
    left_behind: tuple[str, ...] = ()


def find_side_files(folder: Path, used: Collection[str]) -> SideFiles:
    """Sort a folder's files, those of its subfolders included.

    Args:
        folder: of the checkpoint.
        used: names of its weight files and index, which are no side files.

    Raises:
        IncompleteError: a link leads nowhere.
        CheckpointError: a link leads out of the folder.
    """
    copied: list[str] = []
    left_behind: list[str] = []
    for path in walk_files(folder):
        name = path.relative_to(folder).as_posix()
        if name not in used:
            (copied if _is_copied(folder, path) else left_behind).append(name)
    return SideFiles(tuple(copied), tuple(left_behind))


def check_contained(folder: Path, path: Path) -> None:
    """Refuse a link that leads elsewhere than to the folder itself or to the hub cache's blobs beside it.

    Raises:
        IncompleteError: it leads nowhere.
        CheckpointError: it leads out.
    """
    root, target = folder.resolve(), Path(os.path.realpath(path))
    if not target.exists():
        raise IncompleteError(
            f"{path}: a link that leads nowhere", hint="restore what it leads to, or remove it", file=str(path)
        )
    is_blob = root.parent.name == "snapshots" and target.parent == root.parent.parent / "blobs"
    if not (is_blob or target.is_relative_to(root)):
        raise CheckpointError(
            f"{path}: a link that leads out of the checkpoint",
            hint="replace the link by the file, or remove it",
            file=str(path),
        )


def walk_files(folder: Path) -> Iterator[Path]:
    """Yield files, links and hidden folders in the order of their names; links to folders are not followed."""
    waiting = sorted(folder.iterdir(), reverse=True)
    while waiting:
        path = waiting.pop()
        if path.is_dir() and not path.is_symlink() and not path.name.startswith("."):
            waiting += sorted(path.iterdir(), reverse=True)
        else:
            yield path


def _is_copied(folder: Path, path: Path) -> bool:
    if path.is_symlink():
        check_contained(folder, path)
    foreign = path.suffix in WEIGHT_SUFFIXES or path.name.endswith(".index.json") or _is_migrator_file(path.name)
    return path.is_file() and not foreign


def _is_migrator_file(name: str) -> bool:
    """Return whether a file is our manifest or a journal; each rank has a journal of its own."""
    return name == MANIFEST or name.startswith(MARKER)
