"""The names of a checkpoint's files in each layout, and which folder such names allow to be replaced."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path, PurePosixPath

from plans.errors import CheckpointError, DestinationError
from plans.text import format_names

__all__ = [
    "CONFIG",
    "INDEX",
    "MANIFEST",
    "MARKER",
    "MAX_INDEX",
    "METADATA",
    "PICKLED_INDEX",
    "PICKLED_WEIGHTS",
    "WEIGHTS",
    "check_distinct_names",
    "check_replaceable",
    "find_shard_files",
    "get_shard_file_name",
    "is_checkpoint_file",
    "is_pickled_file",
    "is_weight_file",
]

CONFIG = "config.json"
MANIFEST = "migrator.json"

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED_WEIGHTS = "pytorch_model.bin"
PICKLED_INDEX = "pytorch_model.bin.index.json"
"""The names of hub form from before safetensors.

Source: `transformers.utils.WEIGHTS_NAME` and `WEIGHTS_INDEX_NAME`.
"""

MAX_INDEX = 100_000_000
"""The most bytes that an index may have."""

METADATA = ".metadata"
"""Where a distributed checkpoint with `.distcp` files keeps its metadata; shard files keep theirs in their headers.

Source: `torch.distributed.checkpoint.filesystem` of torch 2.13.
"""

MARKER = ".migrator-partial"
"""The journal in a folder that is being written, by which a later run recognizes the folder."""

_PICKLED_SUFFIXES = (".bin", ".pt", ".pth")

_MAX_BYTES = 255
_OTHER_LAYOUTS = re.compile(r"rank-\d+-of-\d+\.safetensors|shard-\d+-model-\d+-of-\d+\.safetensors")
_SHARD_FILE = re.compile(r"shard-[0-9]{5}-model-[0-9]{5}-of-[0-9]{5}\.safetensors")
_SHARD_GLOB = "shard-*-model-*-of-*.safetensors"
_TENSOR_FILES = (
    r"model(-\d{5}-of-\d{5})?\.safetensors|rank-\d+-of-\d+\.safetensors|shard-\d+-model-\d+-of-\d+\.safetensors"
    r"|__\d+_\d+\.distcp|\.metadata|model\.safetensors\.index\.json|migrator\.json"
)
_CHECKPOINT_FILES = re.compile(rf"{_TENSOR_FILES}|(.+/)?(__\d+_\d+\.distcp|\.metadata)")
_KNOWN_FILES = re.compile(
    rf"{_TENSOR_FILES}|\.migrator-partial(-\d+)?"
    r"|((generation_|preprocessor_|processor_|video_preprocessor_)?config|tokenizer(_config)?|vocab|added_tokens"
    r"|special_tokens_map|chat_template)\.json"
    r"|tokenizer\.model|merges\.txt|vocab\.txt|.*\.jinja|README\.md|LICENSE(\.\w+)?|\.gitattributes"
)
"""The files that checkpoints consist of, and those that save_pretrained and the hub put beside them."""


def is_weight_file(name: object) -> bool:
    """Return whether a name can be that of a weight file in hub form: plain, valid on any disk, of no other layout."""
    return _is_plain_name(name, (".safetensors",)) and _OTHER_LAYOUTS.fullmatch(str(name)) is None


def is_pickled_file(name: object) -> bool:
    """Return whether a name can be that of a weight file that torch.save wrote, in the folder itself."""
    return _is_plain_name(name, _PICKLED_SUFFIXES)


def _is_plain_name(name: object, suffixes: tuple[str, ...]) -> bool:
    return (
        isinstance(name, str)
        and name.endswith(suffixes)
        and Path(name).name == name
        and "\\" not in name
        and name.isprintable()
        and len(name.encode(errors="replace")) <= _MAX_BYTES
    )


def is_checkpoint_file(name: str) -> bool:
    """Return whether a file holds or lists tensors of a checkpoint, by its name relative to the checkpoint's folder.

    Readers could take such a file for a part of a newer checkpoint beside it, unlike an adapter's weights.
    """
    return _CHECKPOINT_FILES.fullmatch(name) is not None


def get_shard_file_name(rank: int, number: int, count: int) -> str:
    """Return the name of one of a rank's shard files, which torch numbers from 1.

    Source: `torch.distributed.checkpoint.hf_storage` of torch 2.13.
    """
    return f"shard-{rank + 1:05d}-model-{number + 1:05d}-of-{count:05d}.safetensors"


def find_shard_files(folder: Path) -> list[str]:
    """Return the names of a folder's shard files, by which transformers recognizes a distributed checkpoint."""
    return sorted(path.name for path in folder.iterdir() if _SHARD_FILE.fullmatch(path.name))


def check_distinct_names(folder: Path, names: Iterable[str]) -> None:
    """Refuse a result in which two files have the same name, or a file has the name of another file's folder.

    Args:
        folder: the source's folder.
        names: the names of all files of the result, with `/` between their parts.

    Raises:
        CheckpointError: two names collide.
    """
    counts = Counter(names)
    folders = {str(parent) for name in counts for parent in PurePosixPath(name).parents}
    colliding = sorted(name for name, count in counts.items() if count > 1 or name in folders)
    if colliding:
        raise CheckpointError(
            f"{folder}: the result would contain {format_names(colliding)} twice",
            hint="rename or move away the source's files with these names",
            files=colliding,
        )


def check_replaceable(folder: Path, names: Collection[str] | None = None) -> None:
    """Refuse to replace a folder that is not a checkpoint, or that contains files that would be lost.

    Args:
        folder: the folder to replace; an empty one may always be replaced.
        names: the names of the result's files, which may replace files of the same name; None if not yet known.

    Raises:
        DestinationError: the folder may not be replaced.
    """
    if not _is_checkpoint(folder):
        raise DestinationError(
            f"{folder}: not a checkpoint, and only checkpoints are replaced",
            hint="name a new folder",
            path=str(folder),
        )
    others = [name for name in _list_files(folder) if names is not None and not _is_accounted_for(name, names)]
    if others:
        raise DestinationError(
            f"{folder}: contains {format_names(others)}, which would be lost",
            hint="move these files away, or name a new folder",
            path=str(folder),
            files=others,
        )


def _is_checkpoint(folder: Path) -> bool:
    """Return whether a reader would take a folder for a checkpoint."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    if not any(folder.iterdir()):
        return True
    has_weights = any((folder / name).is_file() for name in (WEIGHTS, INDEX, MANIFEST, METADATA))
    return (folder / CONFIG).is_file() and (has_weights or any(folder.glob(_SHARD_GLOB)))


def _is_accounted_for(name: str, names: Collection[str]) -> bool:
    """Return whether a file is known, or belongs to an optimizer's state that the result replaces in the same place."""
    path = PurePosixPath(name)
    is_optimizer_state = path.suffix == ".distcp" and str(path.with_name(METADATA)) in names
    return name in names or is_optimizer_state or _KNOWN_FILES.fullmatch(name) is not None


def _list_files(folder: Path) -> Iterator[str]:
    """Yield the names of all files, links and empty folders below a folder, with `/` between their parts."""
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not path.is_dir() or not any(path.iterdir()):
            yield path.relative_to(folder).as_posix()
