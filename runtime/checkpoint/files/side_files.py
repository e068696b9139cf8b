"""A checkpoint folder's other files, which go along or stay, and the stamps that tell whether any file changed."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

from plans.errors import CheckpointError, IncompleteError, MismatchError
from plans.text import format_names
from runtime.checkpoint.files.file_names import INDEX, MANIFEST, MARKER, METADATA
from runtime.checkpoint.files.reading import convert_read_errors
from runtime.checkpoint.files.remote import get_origin, has_changed
from runtime.formats import recognize_file

__all__ = [
    "WEIGHT_SUFFIXES",
    "LeftBehind",
    "SideFiles",
    "Stamp",
    "check_contained",
    "check_unchanged",
    "find_side_files",
    "follow_links",
    "read_stamp",
    "read_stamps",
    "walk_files",
]


WEIGHT_SUFFIXES = frozenset(
    (".bin", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".pt", ".pth", ".pkl", ".pickle", ".safetensors")
)
"""The suffixes of weight files in any format."""


@dataclass(frozen=True)
class LeftBehind:
    """Something in a checkpoint's folder that is not part of what is read.

    Args:
        name: the name of a file relative to the folder, or in words what else it is.
        reason: why it is left behind, or what it is; empty if the name tells.
        size: its size in bytes, None if it has none of its own.
        is_file: whether the name is that of a file.
    """

    name: str
    reason: str = ""
    size: int | None = None
    is_file: bool = True

    def __str__(self) -> str:
        size = f"{self.size:,} bytes" if self.size is not None else ""
        details = ", ".join(filter(None, (size, self.reason)))
        return f"{self.name} ({details})" if details else self.name


@dataclass(frozen=True)
class SideFiles:
    """The names of files relative to the checkpoint's folder, with `/` between their parts.

    Args:
        copied: regular files that are copied unchanged.
        left_behind: weights that are not the checkpoint's, hidden folders, and anything that is not a regular file.
    """

    copied: tuple[str, ...] = ()
    left_behind: tuple[LeftBehind, ...] = ()


def find_side_files(folder: Path, used: Collection[str]) -> SideFiles:
    """Find a folder's side files, those of its subfolders included.

    Args:
        folder: the checkpoint's folder.
        used: the names of its weight files and index, which are not side files.

    Raises:
        IncompleteError: a link is broken.
        CheckpointError: a link leads out of the folder.
    """
    copied: list[str] = []
    left_behind: list[LeftBehind] = []
    for path in walk_files(folder):
        name = path.relative_to(folder).as_posix()
        if name in used:
            continue
        if (reason := _find_reason_to_leave(folder, path, used)) is None:
            copied.append(name)
        else:
            size = path.stat().st_size if path.is_file() else None
            left_behind.append(LeftBehind(name, reason, size))
    return SideFiles(tuple(copied), tuple(left_behind))


def check_contained(folder: Path, path: Path) -> None:
    """Refuse a link that leads to anywhere but the folder itself or the hub cache's blobs beside it, unless allowed.

    Raises:
        IncompleteError: the link is broken.
        CheckpointError: the link leads out of the folder.
    """
    root, target = folder.resolve(), Path(os.path.realpath(path))
    if not target.exists():
        raise IncompleteError(f"{path}: a broken link", hint="restore its target", file=str(path))
    snapshot = next((path for path in (root, *root.parents) if path.parent.name == "snapshots"), None)
    is_blob = snapshot is not None and target.parent == snapshot.parent.parent / "blobs"
    if not (_follows_links.get() or is_blob or target.is_relative_to(root)):
        raise CheckpointError(
            f"{path}: a link that leads out of the checkpoint, to {target}",
            hint="if the target is yours, let migrator follow such links with `follow_links`; "
            "or put a copy of the file in its place",
            file=str(path),
        )


_follows_links: ContextVar[bool] = ContextVar("follows_links", default=False)


@contextmanager
def follow_links(allowed: bool = True) -> Iterator[None]:
    """Allow links that lead out of a checkpoint's folder, because the user named it as one of their own.

    Args:
        allowed: whether to allow them; False leaves everything as it is.
    """
    token = _follows_links.set(allowed or _follows_links.get())
    try:
        yield
    finally:
        _follows_links.reset(token)


def walk_files(folder: Path) -> Iterator[Path]:
    """Yield files, links and hidden folders in the order of their names, without following links to folders."""
    waiting = sorted(folder.iterdir(), reverse=True)
    while waiting:
        path = waiting.pop()
        if path.is_dir() and not path.is_symlink() and not path.name.startswith("."):
            waiting += sorted(path.iterdir(), reverse=True)
        else:
            yield path


def _find_reason_to_leave(folder: Path, path: Path, used: Collection[str]) -> str | None:
    """Return why a file does not go along, None if it does."""
    if path.is_symlink():
        check_contained(folder, path)
    if not path.is_file():
        return "a folder" if path.is_dir() else "not a regular file"
    if _is_migrator_file(path.name):
        return "of an earlier reshard"
    if path.suffix == ".distcp":
        return None if _has_metadata(folder, path, used) else f"which no {METADATA} lists"
    if path.name.endswith(".index.json"):
        return "the index of other weights"
    if path.name in _ADAPTER_FILES and path.with_name(_ADAPTER_CONFIG).is_file():
        return "a PEFT adapter, which is not merged"
    if path.suffix == ".safetensors":
        return f"which {INDEX} does not name" if INDEX in used else "other weights"
    if path.suffix in WEIGHT_SUFFIXES:
        row = recognize_file(folder, path.relative_to(folder).as_posix())
        return row.name if row else "weights in another format"
    return None


_ADAPTER_CONFIG = "adapter_config.json"
_ADAPTER_FILES = (_ADAPTER_CONFIG, "adapter_model.safetensors", "adapter_model.bin")
"""The files of an adapter, which jobs save beside or below the weights of its base model.

Source: `peft.PeftModel.save_pretrained` of PEFT 0.17.
"""


def _has_metadata(folder: Path, path: Path, used: Collection[str]) -> bool:
    """Return whether a `.distcp` file is of another distributed checkpoint than the one that was read."""
    metadata = path.with_name(METADATA)
    return metadata.is_file() and metadata.relative_to(folder).as_posix() not in used


def _is_migrator_file(name: str) -> bool:
    """Return whether a file is our manifest, or the journal of a rank."""
    return name == MANIFEST or name.startswith(MARKER)


@dataclass(frozen=True, slots=True)
class Stamp:
    """What changes when a file is written or replaced: its size in bytes, its time in nanoseconds, its inode."""

    size: int
    mtime_ns: int
    inode: int


def read_stamps(folder: Path) -> dict[str, Stamp]:
    """Return the stamps of a folder's files by name, taken before any of them is read.

    Raises:
        CheckpointError: the folder cannot be listed.
    """
    with convert_read_errors(folder):
        paths = [path for path in walk_files(folder) if path.is_file()] if folder.is_dir() else []
    stamps = {path.relative_to(folder).as_posix(): read_stamp(path) for path in paths}
    return {name: stamp for name, stamp in stamps.items() if stamp is not None}


def check_unchanged(folder: Path, stamps: Mapping[str, Stamp], left_behind: Iterable[LeftBehind]) -> None:
    """Refuse to continue if one of a folder's files is no longer the one that was read.

    Args:
        folder: the source's folder.
        stamps: the stamps of its files, taken before they were read.
        left_behind: the files that were not read.

    Raises:
        MismatchError: a file was changed, replaced or removed.
    """
    ignored = {left.name for left in left_behind if left.is_file}
    names = stamps.keys() - ignored
    changed = [name for name in names if read_stamp(folder / name) != stamps[name] or has_changed(folder / name)]
    if changed:
        raise MismatchError(
            f"{get_origin(folder) or folder}: {format_names(sorted(changed))} changed while it was read",
            hint="wait until nothing writes to this folder, then run the same command again",
            files=sorted(changed),
        )


def read_stamp(path: Path) -> Stamp | None:
    """Return the stamp of a file, or None if it does not exist."""
    try:
        status = path.stat()
    except OSError:  # a file that is gone has changed too
        return None
    return Stamp(status.st_size, status.st_mtime_ns, status.st_ino)
