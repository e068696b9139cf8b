"""The names of a distributed checkpoint's files.

Source: `torch.distributed.checkpoint.filesystem` and `hf_storage` of torch 2.13.
"""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["METADATA", "find_shard_files", "get_shard_file_name"]

METADATA = ".metadata"
"""What torch's own form keeps its metadata in; files in safetensors form have theirs in their headers."""

_SHARD = re.compile(r"shard-[0-9]{5}-model-[0-9]{5}-of-[0-9]{5}\.safetensors")


def get_shard_file_name(rank: int, number: int, count: int) -> str:
    """Return the name of one of a rank's files, which torch numbers from one: `shard-00001-model-00001-of-00002…`."""
    return f"shard-{rank + 1:05d}-model-{number + 1:05d}-of-{count:05d}.safetensors"


def find_shard_files(folder: Path) -> list[str]:
    """Return the names of a folder's shard files, by which transformers knows a distributed checkpoint."""
    return sorted(path.name for path in folder.iterdir() if _SHARD.fullmatch(path.name))
