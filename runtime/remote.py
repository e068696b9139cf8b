"""Folders that lie elsewhere, read by ranges: of weights only headers are fetched before their bytes are needed.

A folder of stand-ins takes their place: small files are there, and weight files have their size and their header. All
else is a hole, which takes no disk. What was fetched is kept for the next command, as long as nothing changes.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Protocol

from plans.errors import CheckpointError
from plans.text import shorten
from runtime.checkpoint.files.file_names import METADATA
from runtime.checkpoint.files.remote import RemoteFile, register_origin, register_remote
from runtime.checkpoint.files.safetensors import MAX_HEADER
from runtime.checkpoint.files.side_files import WEIGHT_SUFFIXES

__all__ = ["RemoteEntry", "RemoteFolder", "mount"]

_FIRST_RANGE = 2**16
"""How many bytes of a weight file are asked for at first; most headers are shorter."""

_SMALL = 2**16
"""The size up to which JSON files are fetched; those of tokenizers are larger."""

_THREADS = 16
_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class RemoteEntry:
    """A file of a folder that lies elsewhere: its size in bytes, and what changes when the file does."""

    size: int
    identity: str


class RemoteFolder(Protocol):
    """A folder that lies elsewhere."""

    @property
    def address(self) -> str:
        """Its exact address, without credentials."""

    def list_files(self) -> Mapping[str, RemoteEntry]:
        """Return its files by their names in it, with `/` between their parts."""

    def read(self, name: str, offset: int, size: int) -> bytes:
        """Return at least one and at most so many bytes of a file, from an offset on."""

    def identify(self, name: str) -> str | None:
        """Return what changes when a file does, None if it is gone."""


def mount(remote: RemoteFolder, *, with_side_files: bool = False) -> Path:
    """Return a folder whose files stand for those of another one.

    Args:
        remote: the folder that lies elsewhere.
        with_side_files: whether files that are no weights are fetched whole; else only small JSON files and indexes.

    Raises:
        CheckpointError: a file has a name that no disk allows, or cannot be read.
    """
    entries = remote.list_files()
    kept = _cache_folder() / _hash(remote.address, with_side_files)
    root, records = kept / PurePosixPath(remote.address).name, kept / "identities"
    records.mkdir(parents=True, exist_ok=True)
    stand_ins: list[_StandIn] = []
    for name, entry in entries.items():
        path = _locate(root, name, remote.address)
        path.parent.mkdir(parents=True, exist_ok=True)
        read, identify = partial(remote.read, name), partial(remote.identify, name)
        file = RemoteFile(f"{remote.address}/{name}", entry.size, entry.identity, read, identify)
        register_remote(path, file)
        stand_ins.append(_StandIn(path, records / _hash(name), file))
    _drop_others(root, {stand_in.path for stand_in in stand_ins})
    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(partial(_create, with_side_files=with_side_files), stand_ins))
    register_origin([root], remote.address)
    return root


@dataclass(frozen=True, slots=True)
class _StandIn:
    """A local file, the record of what it stands for, and that file."""

    path: Path
    record: Path
    file: RemoteFile


def _create(stand_in: _StandIn, *, with_side_files: bool) -> None:
    """Create a local file, unless it is there already and stands for the same file."""
    path, record, file = stand_in.path, stand_in.record, stand_in.file
    if path.exists() and record.exists() and record.read_text("utf-8") == file.identity:
        return
    beginning = b""
    while (size := _choose_size(path, file.size, beginning, with_side_files)) > len(beginning):
        beginning += file.read(len(beginning), size - len(beginning))
    descriptor, temporary = tempfile.mkstemp(dir=record.parent)
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(beginning)
        stream.truncate(file.size)
    Path(temporary).replace(path)
    record.write_text(file.identity, "utf-8")


def _choose_size(path: Path, size: int, beginning: bytes, with_side_files: bool) -> int:
    """Return how many bytes of a file should be there, going by its name and by those that are there already."""
    if path.suffix == ".safetensors":
        if len(beginning) < _LENGTH.size:
            return min(size, _FIRST_RANGE)
        length = int(_LENGTH.unpack_from(beginning)[0])
        return max(len(beginning), min(size, _LENGTH.size + length)) if length <= MAX_HEADER else len(beginning)
    if path.suffix in WEIGHT_SUFFIXES or path.suffix == ".distcp":
        return min(size, _FIRST_RANGE)
    is_index = path.name == METADATA or path.name.endswith(".index.json")
    is_small = path.suffix == ".json" and size <= _SMALL
    return size if with_side_files or is_index or is_small else len(beginning)


def _locate(root: Path, name: str, address: str) -> Path:
    parts = name.split("/")
    if not all(part and part not in (".", "..") and part.isprintable() and "\\" not in part for part in parts):
        raise CheckpointError(
            f"{address}: a file has the name {shorten(repr(name))}, which no disk allows",
            hint="rename it, or do not trust this checkpoint",
            source=address,
        )
    return root.joinpath(*parts)


def _drop_others(root: Path, paths: set[Path]) -> None:
    """Remove the stand-ins of files that are gone."""
    for path in root.rglob("*") if root.is_dir() else ():
        if path.is_file() and path not in paths:
            path.unlink()


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "migrator" / "remote"


def _hash(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
