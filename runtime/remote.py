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
from typing import Literal, Protocol

from plans.errors import CheckpointError
from plans.text import shorten
from runtime.checkpoint.files.file_names import CONFIG, MANIFEST, METADATA
from runtime.checkpoint.files.job_folders import HUGGINGFACE_FOLDER
from runtime.checkpoint.files.remote import STAND_INS, RemoteFile, register_origin, register_remote
from runtime.checkpoint.files.safetensors import MAX_HEADER
from runtime.checkpoint.files.side_files import WEIGHT_SUFFIXES

__all__ = ["MAX_ABOVE", "Content", "RemoteEntry", "RemoteFolder", "mount"]

_FIRST_RANGE = 2**16
"""How many bytes of a weight file are asked for at first; most headers are shorter."""

_DOWNLOADS = "migrator-downloads"
"""The name of the folder of files that are there whole, next to the one of stand-ins."""

_SMALL = 2**16
"""The size up to which JSON files are fetched; those of tokenizers are larger."""

_PART = 2**23
_THREADS = 16
_LENGTH = struct.Struct("<Q")


MAX_ABOVE = 2**20
"""How many bytes of a config in a folder above are read."""

Content = Literal["config", "headers", "side files", "everything"]
"""How much of a folder is fetched: only small JSON files, also the headers and indexes that a plan is made of, also the
files that are copied, or weights too.
"""


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

    def read_above(self, name: str) -> tuple[str, bytes] | None:
        """Return a small file of the folder above, or else of the one above that, with the address of its folder."""

    def identify(self, name: str) -> str | None:
        """Return what changes when a file does, None if it is gone."""


def mount(remote: RemoteFolder, content: Content = "side files") -> Path:
    """Return a folder whose files stand for those of another one.

    Args:
        remote: the folder that lies elsewhere.
        content: what is fetched besides the headers of weights, indexes and small JSON files.

    Raises:
        CheckpointError: a file has a name that no disk allows, or cannot be read.
    """
    entries = remote.list_files()
    kept = _cache_folder(_DOWNLOADS if content == "everything" else STAND_INS) / _hash(remote.address, content)
    root, records = kept / "files" / PurePosixPath(remote.address).name, kept / "identities"
    records.mkdir(parents=True, exist_ok=True)
    stand_ins: list[_StandIn] = []
    for name, entry in entries.items():
        path = _locate(root, name, remote.address)
        path.parent.mkdir(parents=True, exist_ok=True)
        read, identify = partial(remote.read, name), partial(remote.identify, name)
        file = RemoteFile(f"{remote.address}/{name}", entry.size, entry.identity, read, identify)
        if content != "everything":
            register_remote(path, file)
        stand_ins.append(_StandIn(path, records / _hash(name), file))
    _drop_others(root, {stand_in.path for stand_in in stand_ins})
    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(partial(_create, content=content), stand_ins))
    register_origin([root], remote.address)
    _place_config_above(remote, entries, root)
    return root


def _place_config_above(remote: RemoteFolder, entries: Mapping[str, RemoteEntry], root: Path) -> None:
    """Put the config of a folder above where it is looked for if a checkpoint has none of its own."""
    path = root.parent / CONFIG
    path.unlink(missing_ok=True)
    if any(name in entries for name in (CONFIG, f"{HUGGINGFACE_FOLDER}/{CONFIG}", MANIFEST)):
        return
    if (found := remote.read_above(CONFIG)) is not None:
        address, content = found
        path.write_bytes(content)
        file = RemoteFile(
            f"{address}/{CONFIG}", len(content), "", lambda start, size: content[start:][:size], lambda: ""
        )
        register_remote(path, file)
        register_origin([root.parent], address)


@dataclass(frozen=True, slots=True)
class _StandIn:
    """A local file, the record of what it stands for, and that file."""

    path: Path
    record: Path
    file: RemoteFile


def _create(stand_in: _StandIn, content: Content) -> None:
    """Create a local file, unless it is there already and stands for the same file."""
    path, record, file = stand_in.path, stand_in.record, stand_in.file
    if path.exists() and record.exists() and record.read_text("utf-8") == file.identity:
        return
    beginning, written = b"", 0
    descriptor, temporary = tempfile.mkstemp(dir=record.parent)
    with os.fdopen(descriptor, "wb") as stream:
        while (size := _choose_size(path, file.size, beginning, content)) > written:
            part = file.read(written, min(size - written, _PART))
            beginning = beginning if written > MAX_HEADER else beginning + part
            written += stream.write(part)
        stream.truncate(file.size)
    Path(temporary).replace(path)
    record.write_text(file.identity, "utf-8")


def _choose_size(path: Path, size: int, beginning: bytes, content: Content) -> int:
    """Return how many bytes of a file should be there, going by its name and by those that are there already."""
    is_index = path.name == METADATA or path.name.endswith(".index.json")
    is_small = path.suffix == ".json" and size <= _SMALL
    if content == "everything" or is_small or (is_index and content != "config"):
        return size
    if content == "config":
        return 0
    if path.suffix == ".safetensors":
        if len(beginning) < min(size, _LENGTH.size):
            return min(size, _FIRST_RANGE)
        length = int(_LENGTH.unpack_from(beginning)[0]) if len(beginning) >= _LENGTH.size else 0
        return min(size, _LENGTH.size + length) if length <= MAX_HEADER else 0
    if path.suffix in WEIGHT_SUFFIXES or path.suffix == ".distcp":
        return min(size, _FIRST_RANGE)
    return size if content == "side files" else 0


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


def _cache_folder(name: str) -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / name


def _hash(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
