"""Shard files of distributed checkpoints in safetensors form: their metadata, and the chunks they store.

Source: `torch.distributed.checkpoint.hf_storage` of torch 2.13.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from plans.errors import HeaderError, IncompleteError
from runtime.checkpoint.dcp.chunks import Chunk
from runtime.checkpoint.files.safetensors import Header, StoredTensor, read_header
from runtime.checkpoint.files.side_files import check_contained
from runtime.checkpoint.files.strict_json import parse_strict_json

__all__ = ["build_sharding_metadata", "read_shard_files"]

_INFO = "DCP_SHARDING_INFO"
_MAX_SIZE = 2**63 - 1


def build_sharding_metadata(offsets: Mapping[str, Sequence[int]]) -> dict[str, str]:
    """Return the metadata of a shard file.

    Args:
        offsets: where the file's part of each tensor begins in it.
    """
    info = {name: {"saved_offsets": list(offset)} for name, offset in offsets.items()}
    return {_INFO: json.dumps(info, ensure_ascii=False), "DCP_VERSION": "1.0", "format": "pt"}


def read_shard_files(folder: Path, names: Sequence[str]) -> list[Chunk]:
    """Return the chunks that shard files store.

    Args:
        folder: of the checkpoint.
        names: of its shard files.

    Raises:
        HeaderError: a header or its sharding metadata lies.
        IncompleteError: a file is cut short.
        CheckpointError: a link leads out of the folder.
    """
    return [chunk for name in names for chunk in _read_file_chunks(folder, folder / name)]


def _read_file_chunks(folder: Path, path: Path) -> list[Chunk]:
    check_contained(folder, path)
    if not path.is_file():
        raise IncompleteError(f"{path}: not a file", hint="copy the file again", file=str(path))
    header = read_header(path)
    info = _read_sharding_info(header)
    return [
        Chunk.contiguous(name, _get_offset(path, name, info, stored), f"{path.name}/{name}", stored)
        for name, stored in header.tensors.items()
    ]


def _read_sharding_info(header: Header) -> Mapping[str, object] | None:
    """Return what the metadata says of each tensor, None where every one is whole."""
    text = header.metadata.get(_INFO)
    return parse_strict_json(text.encode(), header.file) if text else None


def _get_offset(path: Path, name: str, info: Mapping[str, object] | None, stored: StoredTensor) -> tuple[int, ...]:
    if info is None:
        return (0,) * len(stored.shape)
    match info.get(name):
        case {"saved_offsets": list(offset)} if len(offset) == len(stored.shape):
            if all(type(start) is int and 0 <= start <= _MAX_SIZE for start in offset):
                return tuple(offset)
    raise HeaderError(
        f"{path}: {_INFO} does not say where {name!r} begins",
        hint="the file is damaged; copy or save it again",
        file=str(path),
        tensor=name,
    )
