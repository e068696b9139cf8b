"""The tensors that the files of a distributed checkpoint store, under the names that they have in a model.

Training jobs save a model inside other state and inside wrappers, and some of them under the names of its hub form.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from plans.errors import CheckpointError
from plans.text import format_names
from runtime.checkpoint.dcp.chunks import Chunk
from runtime.checkpoint.dcp.metadata import ChunkMetadata, read_metadata
from runtime.checkpoint.dcp.storage import read_chunks, read_shard_files
from runtime.checkpoint.files.file_names import METADATA, find_shard_files
from runtime.checkpoint.files.side_files import LeftBehind
from runtime.checkpoint.hub.conversion import find_model_names
from runtime.checkpoint.near_names import check_distinct, strip_wrappers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["SavedTensors", "name_chunks", "read_saved_tensors"]


_Part = TypeVar("_Part", ChunkMetadata, Chunk)


@dataclass(frozen=True)
class SavedTensors:
    """The tensors that a folder stores.

    Args:
        chunks: the chunks of all tensors.
        declared_shapes: the shapes that `.metadata` or rank files give by name; shard files do not give any.
        files: the names of the files that were read.
        left_behind: descriptions of what is saved besides the model.
        names: all saved names, with their prefix.
        has_hub_names: whether the names are those of the model's hub form.
    """

    chunks: Sequence[Chunk]
    declared_shapes: Mapping[str, tuple[int, ...]]
    files: Collection[str]
    left_behind: Sequence[LeftBehind]
    names: Collection[str]
    has_hub_names: bool = False


@dataclass(frozen=True)
class _Naming:
    """How saved names are read as those of a model.

    Args:
        names: the name of each tensor of the model, by saved name.
        left_behind: descriptions of the other tensors.
        is_hub: whether the model's names are those of its hub form.
    """

    names: Mapping[str, str]
    left_behind: tuple[LeftBehind, ...]
    is_hub: bool = False

    def rename(self, parts: Iterable[_Part]) -> list[_Part]:
        """Return the parts that belong to the model, under their names in it."""
        return [replace(part, name=self.names[part.name]) for part in parts if part.name in self.names]


def read_saved_tensors(folder: Path, wanted: Collection[str], model: PreTrainedModel) -> SavedTensors:
    """Read which chunks a folder stores, from headers only.

    Args:
        folder: the checkpoint's folder, with shard files or `.distcp` files.
        wanted: the names of the model's tensors.
        model: the model, on meta.

    Raises:
        IncompleteError: a file is missing or truncated.
        HeaderError: headers or metadata are wrong.
        CheckpointError: the folder contains more than one model, or two names are equal without their wrappers.
    """
    if files := find_shard_files(folder):
        return name_chunks(folder, read_shard_files(folder, files), {}, files, (), wanted, model)
    saved = read_metadata(folder)
    naming = _find_naming(folder, saved.shapes, wanted, model)
    left_behind = (
        *naming.left_behind,
        *(LeftBehind(f"{name!r} of {METADATA}", "no tensor", is_file=False) for name in saved.non_tensors),
    )
    shapes = {naming.names[name]: shape for name, shape in saved.shapes.items() if name in naming.names}
    chunks = read_chunks(folder, naming.rename(saved.chunks))
    return SavedTensors(chunks, shapes, {METADATA, *saved.files}, left_behind, saved.shapes.keys(), naming.is_hub)


def name_chunks(
    folder: Path,
    chunks: Sequence[Chunk],
    shapes: Mapping[str, tuple[int, ...]],
    files: Collection[str],
    left_behind: Sequence[LeftBehind],
    wanted: Collection[str],
    model: PreTrainedModel,
) -> SavedTensors:
    """Return the tensors of a model among those that files store, under the names that they have in the model.

    Args:
        folder: the folder of the files.
        chunks: the chunks of all tensors.
        shapes: their shapes by name, as far as the files give them.
        files: the names of the files.
        left_behind: what else the files contain.
        wanted: the names of the model's tensors.
        model: the model, on meta.

    Raises:
        CheckpointError: the files contain more than one model, or two names are equal without their wrappers.
    """
    stored = dict.fromkeys(chunk.name for chunk in chunks)
    naming = _find_naming(folder, stored, wanted, model)
    selected = {naming.names[name]: shape for name, shape in shapes.items() if name in naming.names}
    others = (*naming.left_behind, *left_behind)
    return SavedTensors(naming.rename(chunks), selected, files, others, stored.keys(), naming.is_hub)


def _find_naming(folder: Path, stored: Collection[str], wanted: Collection[str], model: PreTrainedModel) -> _Naming:
    """Return how the saved names are read: as they are, or else without wrappers, or else as names of the hub form.

    A prefix that all of the model's names have is taken out, and tensors without it are left behind. If the model is
    complete by no reading, the names are those that are stored.
    """
    as_stored, bare = {name: name for name in stored}, {name: strip_wrappers(name) for name in stored}
    readings = [as_stored, bare] if bare != as_stored else [as_stored]
    for names in readings:
        prefix = _find_prefix(names.values(), wanted, folder)
        if prefix is not None:
            return _apply_prefix(folder, names, prefix)
    for names in readings:
        for prefix in _list_prefixes(names.values(), wanted):
            naming = _apply_prefix(folder, names, prefix, is_hub=True)
            if set(find_model_names(model, naming.names.values())).issuperset(wanted):
                return naming
    return _Naming(as_stored, ())


def _apply_prefix(folder: Path, names: Mapping[str, str], prefix: str, *, is_hub: bool = False) -> _Naming:
    with_prefix = {stored: name.removeprefix(prefix) for stored, name in names.items() if name.startswith(prefix)}
    check_distinct(folder, with_prefix)
    others = [name for stored, name in names.items() if stored not in with_prefix]
    return _Naming(with_prefix, _describe_unprefixed(others), is_hub)


def _find_prefix(names: Collection[str], wanted: Collection[str], folder: Path) -> str | None:
    """Return the prefix of the names of all the model's tensors, which is mostly empty; None if some are missing."""
    known = frozenset(names)
    complete = [prefix for prefix in _list_prefixes(names, wanted) if all(prefix + name in known for name in wanted)]
    if "" in complete:
        return ""
    if len(complete) > 1:
        raise CheckpointError(
            f"{folder}: contains several models, under {format_names(complete)}",
            hint="save the model that you want alone",
            prefixes=complete,
        )
    return complete[0] if complete else None


def _list_prefixes(names: Iterable[str], wanted: Collection[str]) -> list[str]:
    """Return the empty prefix, and those after which a name is that of the model's first tensor."""
    first = next(iter(wanted))
    return list(dict.fromkeys(("", *(name.removesuffix(first) for name in names if name.endswith(f".{first}")))))


def _describe_unprefixed(names: Iterable[str]) -> tuple[LeftBehind, ...]:
    """Describe the tensors without the prefix, counted by the first part of their names."""
    counts = Counter(name.partition(".")[0] for name in names)
    return tuple(
        LeftBehind(f"{word!r} beside the model", f"{count} in number", is_file=False) for word, count in counts.items()
    )
