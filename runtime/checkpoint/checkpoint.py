"""A checkpoint of any layout, read up to its headers: tensors mapped onto what files store, and the recorded config."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

from plans.errors import CheckpointError
from runtime.checkpoint.files.file_names import CONFIG
from runtime.checkpoint.files.reading import is_nested_deeper, read_at_most
from runtime.checkpoint.files.safetensors import StoredTensor
from runtime.checkpoint.files.side_files import SideFiles
from runtime.checkpoint.manifest import MAX_CONFIG_DEPTH, Manifest, StoredForm, TensorKind
from runtime.models.config_entries import ConfigDifference, compare_entries
from runtime.tensor_map.tensor_map import TensorMap

__all__ = [
    "Checkpoint",
    "KeyPath",
    "Layout",
    "OptimizerState",
    "SourceLayout",
    "TensorCopy",
    "TensorInfo",
    "find_config_changes",
    "get_config_record",
    "read_config_entries",
]


Layout = Literal["hf", "dcp", "ranks"]
"""The layouts that can be written."""

SourceLayout = Layout | Literal["fsdp", "foreign"]
"""The layouts that can be read."""

KeyPath = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a checkpoint says about a whole tensor.

    Args:
        kind: `carried` for a tensor that the model has no parameter for.
        dtype: the dtype by its name in safetensors.
        shape: the shape of the whole tensor.
    """

    kind: TensorKind
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class TensorCopy:
    """One of the copies of a tensor that a checkpoint stores. A copy equals only itself.

    Args:
        name: the tensor's name.
        tensor_map: the tensor over the stored chunks that make up this copy.
        ranks: the ranks whose files together store this copy; empty if it belongs to no rank.
    """

    name: str
    tensor_map: TensorMap = field(repr=False)
    ranks: tuple[int, ...] = ()


@dataclass(frozen=True)
class OptimizerState:
    """The state of an optimizer, read up to its headers.

    Args:
        folder: the state's folder relative to the model's, `.` if they are the same.
        tensors: the tensors by saved name; `parameter` if sharded like their parameter, else `carried`.
        parameters: the name of each such tensor's parameter, by saved name.
        tensor_maps: the tensors over the stored chunks.
        chunks: the stored chunks by name.
        values: the pickles of everything that is not a tensor, by saved name, checked to be plain data.
        paths: the keys that lead to each saved value in the nested state dict, by saved name.
        stateless: the model's parameters that have no state, such as frozen ones.
    """

    folder: str
    tensors: Mapping[str, TensorInfo]
    parameters: Mapping[str, str]
    tensor_maps: Mapping[str, TensorMap] = field(repr=False)
    chunks: Mapping[str, StoredTensor] = field(repr=False)
    values: Mapping[str, bytes] = field(repr=False)
    paths: Mapping[str, KeyPath] = field(repr=False)
    stateless: tuple[str, ...]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint read up to its headers; no tensor has been read.

    Args:
        folder: the checkpoint's folder.
        layout: the layout of its files.
        tensors: the tensors by their names in the model, carried ones by stored name; tied names are left out.
        tied: each tied name with the name that holds the bytes.
        tensor_maps: the tensors over the stored chunks.
        chunks: the stored chunks, by names that only this layout knows.
        side_files: the other files.
        manifest: the checkpoint's manifest, None if it has none.
        find_stored_form: returns the hub form that the tensors came from, None if unknown.
        optimizer: the state of the optimizer, if it is part of what was read.
        config_folder: the folder of config.json if that is not the checkpoint's own.
        extra_files: the content of files outside the folder that belong to the checkpoint, by name.
        reoriented: the tensors that transformers would read otherwise: square ones that are stored transposed, as those
            beside them are.
        notes: what was found elsewhere than in the folder itself.
        saved_order: the names in the order in which rank files save them, empty for other layouts.
        recorded_digests: digests that were recorded apart from the checkpoint, None to go by its manifest.
    """

    folder: Path
    layout: SourceLayout
    tensors: Mapping[str, TensorInfo]
    tied: Mapping[str, str]
    tensor_maps: Mapping[str, TensorMap] = field(repr=False)
    chunks: Mapping[str, StoredTensor] = field(repr=False)
    side_files: SideFiles
    manifest: Manifest | None = field(default=None, repr=False)
    find_stored_form: Callable[[], StoredForm | None] = field(default=lambda: None, repr=False, compare=False)
    optimizer: OptimizerState | None = None
    config_folder: Path | None = None
    extra_files: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    reoriented: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    saved_order: tuple[str, ...] = ()
    recorded_digests: Mapping[str, str] | None = field(default=None, repr=False)

    @cached_property
    def stored_form(self) -> StoredForm | None:
        """The hub form that the tensors came from, None if unknown; a load does not pay for it."""
        return self.find_stored_form()

    @cached_property
    def digests(self) -> Mapping[str, str]:
        """The digests that are recorded for these tensors, the optimizer's included if its state was read."""
        if self.recorded_digests is not None:
            return self.recorded_digests
        if self.manifest is None:
            return {}
        digests = {name: entry.digest for name, entry in self.manifest.tensors.items()}
        return {**digests, **self.manifest.optimizer} if self.optimizer else digests

    @property
    def all_tensors(self) -> dict[str, TensorInfo]:
        """The model's tensors and, by their saved names, the optimizer's."""
        return {**self.tensors, **(self.optimizer.tensors if self.optimizer else {})}

    @property
    def all_tensor_maps(self) -> dict[str, TensorMap]:
        """The tensor maps of the model's tensors and of the optimizer's."""
        return {**self.tensor_maps, **(self.optimizer.tensor_maps if self.optimizer else {})}

    @property
    def all_chunks(self) -> dict[str, StoredTensor]:
        """The stored chunks of the model's tensors and of the optimizer's."""
        return {**self.chunks, **(self.optimizer.chunks if self.optimizer else {})}


_MAX_BYTES = 2**24


def get_config_record(checkpoint: Checkpoint) -> Mapping[str, object] | None:
    """Return the config entries for the manifest of a result: those that the source recorded, or else its config's.

    Like digests, a record is passed on with the tensors. A new record of a config that has been edited would declare
    the edit right and hide it from then on. With the old one, `verify` and `validate` report the edit in every
    checkpoint made from this one, until the config is restored or the record is removed by hand.

    Raises:
        CheckpointError: the config cannot be read.
    """
    if checkpoint.manifest is not None and checkpoint.manifest.config is not None:
        return checkpoint.manifest.config
    if (text := checkpoint.extra_files.get(CONFIG)) is not None:
        return _parse_entries(text, checkpoint.folder / CONFIG)
    return read_config_entries(checkpoint.config_folder or checkpoint.folder)


def find_config_changes(checkpoint: Checkpoint) -> tuple[ConfigDifference, ...]:
    """Return the entries that make a checkpoint's config compute something else than the recorded one.

    There are none if no config was recorded or the folder has none.

    Raises:
        CheckpointError: the config cannot be read.
    """
    recorded = checkpoint.manifest.config if checkpoint.manifest else None
    entries = read_config_entries(checkpoint.config_folder or checkpoint.folder) if recorded is not None else None
    return compare_entries(entries, recorded) if entries is not None and recorded is not None else ()


def read_config_entries(folder: Path) -> dict[str, object] | None:
    """Return the entries of a folder's config.json, None if there is none.

    Raises:
        CheckpointError: the file cannot be read, or is not a config.
    """
    path = folder / CONFIG
    return _parse_entries(read_at_most(path, _MAX_BYTES), path) if path.exists() else None


def _parse_entries(text: bytes, path: Path) -> dict[str, object]:
    """Parse a config as transformers does, into values that a manifest can record."""
    try:
        # NaN and infinity, which JSON lacks, are recorded as transformers writes them.
        entries = json.loads(text, parse_constant=lambda name: {"__float__": name})
        json.dumps(entries, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError) as error:
        raise _config_error(path, f"not valid JSON: {error}") from error
    if not isinstance(entries, dict) or is_nested_deeper(entries, MAX_CONFIG_DEPTH):
        raise _config_error(path, f"not an object nested at most {MAX_CONFIG_DEPTH} deep")
    return entries


def _config_error(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path}: {what}", hint="restore the file, or save the checkpoint again", file=str(path))
