"""File names of every layout, what a weight file may be called, and a check that no two files collide.

Source: `torch.distributed.checkpoint.filesystem` and `hf_storage` of torch 2.13.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from plans.errors import CheckpointError
from plans.text import format_names

__all__ = [
    "CONFIG",
    "INDEX",
    "MANIFEST",
    "MARKER",
    "METADATA",
    "WEIGHTS",
    "check_distinct_names",
    "find_shard_files",
    "get_shard_file_name",
    "is_weight_file",
]

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MANIFEST = "migrator.json"
METADATA = ".metadata"
"""Where torch's `.distcp` checkpoints keep their metadata; in safetensors form it is in the files' headers."""

MARKER = ".migrator-partial"
"""The journal of a folder that is being written, by which a later run knows what was left there."""

_MAX_BYTES = 255
_SHARD = re.compile(r"shard-[0-9]{5}-model-[0-9]{5}-of-[0-9]{5}\.safetensors")
_OTHER_LAYOUTS = re.compile(r"rank-\d+-of-\d+\.safetensors|shard-\d+-model-\d+-of-\d+\.safetensors")


def is_weight_file(name: object) -> bool:
    """Return whether this is the plain name of a safetensors file, of no other layout's, that any disk can have."""
    return (
        isinstance(name, str)
        and name.endswith(".safetensors")
        and Path(name).name == name
        and "\\" not in name
        and name.isprintable()
        and len(name.encode(errors="replace")) <= _MAX_BYTES
        and _OTHER_LAYOUTS.fullmatch(name) is None
    )


def check_distinct_names(folder: Path, names: Iterable[str]) -> None:
    """Refuse a result in which two files would have one name, or one the name of another's folder.

    Args:
        folder: of the source.
        names: of all files of the result, `/` between their parts.

    Raises:
        CheckpointError: two of them are in each other's way.
    """
    counts = Counter(names)
    folders = {str(parent) for name in counts for parent in PurePosixPath(name).parents}
    twice = sorted(name for name, count in counts.items() if count > 1 or name in folders)
    if twice:
        raise CheckpointError(
            f"{folder}: the result would have two of {format_names(twice)}",
            hint="rename or move away the source's files of these names",
            files=twice,
        )


def get_shard_file_name(rank: int, number: int, count: int) -> str:
    """Return the name of one of a rank's files, which torch numbers from one: `shard-00001-model-00001-of-00002…`."""
    return f"shard-{rank + 1:05d}-model-{number + 1:05d}-of-{count:05d}.safetensors"


def find_shard_files(folder: Path) -> list[str]:
    """Return the names of a folder's shard files, by which transformers knows a distributed checkpoint."""
    return sorted(path.name for path in folder.iterdir() if _SHARD.fullmatch(path.name))
