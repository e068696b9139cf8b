"""What the folder of a distributed checkpoint stores, in either form, by the names in the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from plans.errors import CheckpointError
from runtime.checkpoint.dcp.chunks import Chunk, Shape
from runtime.checkpoint.dcp.metadata import ChunkMetadata, read_metadata
from runtime.checkpoint.dcp.names import METADATA, find_shard_files
from runtime.checkpoint.dcp.safetensors import read_shard_files
from runtime.checkpoint.dcp.storage import read_chunks
from runtime.wording import format_names

__all__ = ["SavedTensors", "read_saved_tensors"]

_Part = TypeVar("_Part", ChunkMetadata, Chunk)


@dataclass(frozen=True)
class SavedTensors:
    """The tensors that a folder stores.

    Args:
        chunks: of all tensors.
        declared_shapes: shapes that metadata state by name; in safetensors form only the chunks tell.
        files: that were read.
        left_behind: what is saved besides the model, in words.
    """

    chunks: Sequence[Chunk]
    declared_shapes: Mapping[str, Shape]
    files: Collection[str]
    left_behind: Sequence[str]


def read_saved_tensors(folder: Path, model: Collection[str]) -> SavedTensors:
    """Read which chunks a folder stores, headers only.

    Training jobs save a model inside other state, `{"model": …, "optimizer": …}`: then its names have a prefix, and
    what has another one is left behind.

    Args:
        folder: of the checkpoint, in safetensors form or with `.distcp` files.
        model: names of the model's tensors.

    Raises:
        IncompleteError: a file is missing or cut short.
        HeaderError: headers or metadata lie.
        CheckpointError: it holds more than one model.
    """
    files = find_shard_files(folder)
    if files:
        chunks = read_shard_files(folder, files)
        names = dict.fromkeys(chunk.name for chunk in chunks)
        prefix = _find_prefix(names, model, folder)
        return SavedTensors(_strip_prefix(prefix, chunks), {}, files, _describe_unprefixed(prefix, names))
    saved = read_metadata(folder)
    prefix = _find_prefix(saved.shapes, model, folder)
    chunks = read_chunks(folder, _strip_prefix(prefix, saved.chunks))
    stated = {name.removeprefix(prefix): shape for name, shape in saved.shapes.items() if name.startswith(prefix)}
    left_behind = (
        *_describe_unprefixed(prefix, saved.shapes),
        *(f"{name!r} of {METADATA}, no tensor" for name in saved.non_tensors),
    )
    return SavedTensors(chunks, stated, {METADATA, *saved.files}, left_behind)


def _find_prefix(names: Collection[str], model: Collection[str], folder: Path) -> str:
    """Return what stands before the names of all the model's tensors, mostly nothing."""
    first = next(iter(model))
    if first in names:
        return ""
    ending = f".{first}"
    candidates = [name.removesuffix(first) for name in names if name.endswith(ending)]
    complete = [prefix for prefix in candidates if all(prefix + name in names for name in model)]
    if len(complete) > 1:
        raise CheckpointError(
            f"{folder}: holds several models, under {format_names(complete)}",
            hint="save the one that is wanted by itself",
            prefixes=complete,
        )
    return complete[0] if complete else ""


def _strip_prefix(prefix: str, parts: Iterable[_Part]) -> list[_Part]:
    return [replace(one, name=one.name.removeprefix(prefix)) for one in parts if one.name.startswith(prefix)]


def _describe_unprefixed(prefix: str, names: Iterable[str]) -> tuple[str, ...]:
    """Return in words what has not the prefix, tensors of one first word together."""
    counts = Counter(name.partition(".")[0] for name in names if not name.startswith(prefix))
    return tuple(f"{word!r} beside the model, {count} in number" for word, count in counts.items())
