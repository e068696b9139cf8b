"""A file of digests for a checkpoint that has no manifest: recorded once, compared by whoever reads it later.

A digest here finds damage: a lost write, a bad disk, a mixture of two saves. It is no signature. Who can change the
weights on purpose can make others with the same digest, or change this file. Checksums of whole files by SHA-256 may
stand beside them; they tell tampering too, as long as this file comes from a place that others cannot write to.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from plans.errors import DestinationError, HeaderError, MismatchError
from plans.text import format_names
from runtime.checkpoint.checkpoint import Checkpoint
from runtime.checkpoint.digest import ABOUT
from runtime.checkpoint.files.reading import open_descriptor, parse_strict_json, read_at_most, read_exactly

__all__ = ["DigestFile", "apply_digests", "find_changed_files", "read_digest_file", "write_digest_file"]

_FORMAT = "migrator digests"
_VERSION = 1
_ABOUT = f"{ABOUT} sha256, where it is given, is that of a whole file."
_MAX_BYTES = 2**28
_PART = 2**23
_DIGEST = re.compile(r"[0-9a-f]{32}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class DigestFile:
    """The digests of a checkpoint.

    Args:
        tensors: the dtype, shape and digest of each tensor by its name in the model.
        files: the SHA-256 of each file by its name, empty if none were asked for.
    """

    tensors: Mapping[str, tuple[str, tuple[int, ...], str]] = field(repr=False)
    files: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def digests(self) -> dict[str, str]:
        """The digest of each tensor by its name in the model."""
        return {name: digest for name, (_, _, digest) in self.tensors.items()}


def write_digest_file(
    path: Path, checkpoint: Checkpoint, digests: Mapping[str, str], *, with_sha256: bool = False
) -> DigestFile:
    """Write the digests of a checkpoint to a new file.

    Args:
        path: the file.
        checkpoint: the checkpoint.
        digests: the digest of each of its tensors by name.
        with_sha256: whether to add the SHA-256 of every file that the checkpoint consists of, which are read for it.

    Raises:
        DestinationError: the file exists, or cannot be written.
        CheckpointError: a file of the checkpoint cannot be read.
    """
    tensors = {name: (info.dtype, info.shape, digests[name]) for name, info in checkpoint.all_tensors.items()}
    names = _list_files(checkpoint) if with_sha256 else ()
    files = {name: _compute_sha256(checkpoint.folder / name) for name in names}
    content = {
        "format": _FORMAT,
        "version": _VERSION,
        "about": _ABOUT,
        "tensors": {
            name: {"dtype": dtype, "shape": list(shape), "digest": digest}
            for name, (dtype, shape, digest) in tensors.items()
        },
        **({"files": {name: {"sha256": digest} for name, digest in files.items()}} if files else {}),
    }
    try:
        with path.open("x", encoding="utf-8") as stream:
            stream.write(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    except OSError as error:
        raise DestinationError(
            f"{path}: {error.strerror or error}",
            hint="name a new file in a folder that you may write to",
            path=str(path),
        ) from error
    return DigestFile(tensors, files)


def read_digest_file(path: Path) -> DigestFile:
    """Read the digests that `write_digest_file` wrote.

    Raises:
        HeaderError: the file is damaged, or is no such file.
        CheckpointError: it cannot be read.
    """
    content = parse_strict_json(read_at_most(path, _MAX_BYTES), path)
    tensors, files = content.get("tensors"), content.get("files", {})
    if (content.get("format"), content.get("version")) != (_FORMAT, _VERSION) or not isinstance(tensors, dict):
        raise _damaged_error(path, f"is not a file of {_FORMAT}, version {_VERSION}")
    rows = {name: _parse_tensor(path, name, row) for name, row in tensors.items()}
    sums: dict[str, str] = {}
    for name, row in files.items() if isinstance(files, dict) else ():
        match row:
            case {"sha256": str(digest)} if _SHA256.fullmatch(digest) and _is_inside(name):
                sums[name] = digest
            case _:
                raise _damaged_error(path, f"has no SHA-256 of {name!r}")
    return DigestFile(rows, sums)


def _is_inside(name: str) -> bool:
    return not Path(name).is_absolute() and ".." not in Path(name).parts


def _parse_tensor(path: Path, name: str, row: object) -> tuple[str, tuple[int, ...], str]:
    match row:
        case {"dtype": str(dtype), "shape": list(shape), "digest": str(digest)} if _DIGEST.fullmatch(digest):
            return dtype, tuple(shape), digest
    raise _damaged_error(path, f"has no digest of {name!r}")


def _damaged_error(path: Path, what: str) -> HeaderError:
    return HeaderError(f"{path}: {what}", hint="record the digests again with `migrator verify SOURCE --record FILE`")


def apply_digests(checkpoint: Checkpoint, recorded: DigestFile) -> Checkpoint:
    """Return a checkpoint with digests that were recorded for it.

    Raises:
        MismatchError: the record is of other tensors.
    """
    own = {name: (info.dtype, info.shape) for name, info in checkpoint.all_tensors.items()}
    listed = {name: (dtype, shape) for name, (dtype, shape, _) in recorded.tensors.items()}
    if differing := [name for name in {**listed, **own} if own.get(name) != listed.get(name)]:
        raise MismatchError(
            f"{checkpoint.folder}: the recorded digests are of another checkpoint, which differs in "
            f"{format_names(differing)}",
            hint="name the file that was recorded for this checkpoint",
            tensors=differing,
        )
    return replace(checkpoint, recorded_digests=recorded.digests)


def find_changed_files(checkpoint: Checkpoint, recorded: DigestFile) -> Iterator[tuple[str, str, str]]:
    """Yield the files whose SHA-256 is not the recorded one: the name, and what was recorded and found."""
    for name, expected in recorded.files.items():
        path = checkpoint.folder / name
        found = _compute_sha256(path) if path.is_file() else "no file"
        if found != expected:
            yield name, expected, found


def _list_files(checkpoint: Checkpoint) -> list[str]:
    folder = checkpoint.folder
    used = {chunk.file.relative_to(folder).as_posix() for chunk in checkpoint.all_chunks.values()}
    index = {path.name for path in folder.glob("*.index.json")}
    return sorted({*used, *index, *checkpoint.side_files.copied})


def _compute_sha256(path: Path) -> str:
    hashed = hashlib.sha256()
    size = path.stat().st_size
    buffer = memoryview(bytearray(min(_PART, max(size, 1))))
    with open_descriptor(path) as descriptor:
        for start in range(0, size, _PART):
            part = buffer[: min(_PART, size - start)]
            read_exactly(descriptor, part, start, path)
            hashed.update(part)
    return hashed.hexdigest()
