"""The sharding metadata in headers of torch's distributed writer: which chunk of a tensor a file stores.

A safetensors file has one tensor of a name. torch's writer puts every chunk that a rank has of a tensor under the
tensor's name, so that the last one replaces the others: those of strided shards before torch 2.13, and those of a
`CheckpointableTensor` since 2.14. The result is lossy without an error.

Source: `torch.distributed.checkpoint.filesystem` and `.hf_storage` of torch 2.9.1 to 2.15.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from plans.errors import HeaderError, IncompleteError
from plans.text import format_names
from runtime.checkpoint.files.reading import is_size, parse_strict_json
from runtime.checkpoint.files.safetensors import Header

__all__ = ["LOSSY_HINT", "build_lossy_error", "build_sharding_metadata", "read_offsets"]

_SHARDING_INFO = "DCP_SHARDING_INFO"

LOSSY_HINT = (
    "files of some ranks are missing, or torch lost rows when it saved several chunks of a tensor in one safetensors "
    "file (strided shards before 2.13, `CheckpointableTensor` since 2.14); save again, as .distcp files"
)
"""What makes a distributed checkpoint lossy, and the next step."""


def build_sharding_metadata(offsets: Mapping[str, Sequence[int]]) -> dict[str, str]:
    """Return the metadata of a shard file.

    Args:
        offsets: where the file's chunk begins in its tensor, by the tensor's name.
    """
    info = {name: {"saved_offsets": list(offset)} for name, offset in offsets.items()}
    return {_SHARDING_INFO: json.dumps(info, ensure_ascii=False), "DCP_VERSION": "1.0", "format": "pt"}


def read_offsets(header: Header) -> dict[str, tuple[int, ...]] | None:
    """Return where the chunks in a file begin in their tensors, by name, or None if the header does not tell.

    Raises:
        HeaderError: the sharding metadata is damaged, or leaves out a tensor.
    """
    text = header.metadata.get(_SHARDING_INFO)
    if not text:
        return None
    info = parse_strict_json(text.encode(), header.file)
    return {name: _get_offset(header, name, info, len(stored.shape)) for name, stored in header.tensors.items()}


def _get_offset(header: Header, name: str, info: Mapping[str, object], dims: int) -> tuple[int, ...]:
    match info.get(name):
        case {"saved_offsets": list(offset)} if len(offset) == dims and all(map(is_size, offset)):
            return tuple(offset)
    raise HeaderError(
        f"{header.file}: {_SHARDING_INFO} does not give the offset of {name!r}",
        hint="the file is damaged; copy or save it again",
        file=str(header.file),
        tensor=name,
    )


def build_lossy_error(lossy: Mapping[str, Sequence[int]]) -> IncompleteError:
    """Return the error for tensors whose elements are not all stored.

    Args:
        lossy: how many elements are stored, and of how many, by the tensor's name.
    """
    name, (stored, expected) = next(iter(lossy.items()))
    return IncompleteError(
        f"the checkpoint is lossy: {format_names(list(lossy))} not whole, {name!r} has {stored} of {expected} elements",
        hint=LOSSY_HINT,
        lossy=dict(lossy),
    )
