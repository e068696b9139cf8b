"""Reading an optimizer's checkpoint beside a model's: `.distcp` files with fully qualified names.

Source: `save_optimizer_distributed` of transformers 5.23; `get_optimizer_state_dict` of torch 2.13.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from math import prod
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from plans.errors import CheckpointError, ConversionError, HeaderError, IncompleteError, MismatchError
from plans.text import format_names
from runtime.checkpoint.checkpoint import Checkpoint, OptimizerState, TensorInfo
from runtime.checkpoint.dcp.archive import BoundedFile, read_data_pickle
from runtime.checkpoint.dcp.chunks import Shape, join_chunks
from runtime.checkpoint.dcp.metadata import DcpMetadata, StorageLocation, read_metadata
from runtime.checkpoint.dcp.pickle import PickledCall, PickledDict, read_pickle
from runtime.checkpoint.dcp.storage import locate_archive, open_distcp_file, read_chunks
from runtime.checkpoint.files.file_names import METADATA
from runtime.checkpoint.files.safetensors import find_dtypes
from runtime.checkpoint.optimizer.names import SavedName, find_prefix, split_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "OptimizerCheckpoint",
    "check_listed_keys",
    "check_states_complete",
    "find_optimizer",
    "read_optimizer",
    "read_values",
]


_Settings = tuple[int, tuple[tuple[str, bytes], ...]]
"""What decides about a parameter's states: how many dims it has, and its hyperparameters, each with its pickle."""


def check_listed_keys(listed_names: Collection[str], names: Mapping[str, SavedName], folder: Path) -> None:
    """Refuse metadata that list keys which they say nothing of.

    Args:
        listed_names: the keys.
        names: that the metadata describe.
        folder: of the optimizer's checkpoint.

    Raises:
        IncompleteError: there are such keys.
    """
    _refuse_missing([name for name in listed_names if name not in names], folder)


def check_states_complete(
    names: Mapping[str, SavedName], values: Mapping[str, bytes], parameters: Mapping[str, Shape], folder: Path
) -> None:
    """Refuse parameters that lack a state which others with as many dims and the very same hyperparameters have.

    Parameters without any state are frozen ones, and hyperparameters of numbered groups say nothing of parameters.

    Args:
        names: all that are saved, with their parts.
        values: pickles of those that are no tensors.
        parameters: shapes of the model's parameters.
        folder: of the optimizer's checkpoint.

    Raises:
        IncompleteError: there are such parameters.
    """
    settings = _read_settings(names, values, parameters)
    states: defaultdict[str, dict[str, str]] = defaultdict(dict)
    for name, row in names.items():
        if row.section == "state" and row.parameter in settings:
            states[row.parameter][row.entry] = name
    wanted: defaultdict[_Settings, set[str]] = defaultdict(set)
    for parameter, entries in states.items():
        wanted[settings[parameter]] |= entries.keys()
    missing = [
        f"{entry} of {parameter}"
        for parameter, entries in states.items()
        for entry in sorted(wanted[settings[parameter]] - entries.keys())
    ]
    _refuse_missing(missing, folder)


def _read_settings(
    names: Mapping[str, SavedName], values: Mapping[str, bytes], parameters: Mapping[str, Shape]
) -> dict[str, _Settings]:
    """Return what decides about the states of each parameter that has hyperparameters of its own."""
    settings: defaultdict[str, list[tuple[str, bytes]]] = defaultdict(list)
    for name, row in names.items():
        if row.section == "param_groups" and row.parameter is not None:
            settings[row.parameter].append((row.entry, values.get(name, b"")))
    return {name: (len(parameters[name]), tuple(sorted(pairs))) for name, pairs in settings.items()}


def _refuse_missing(missing: Sequence[str], folder: Path) -> None:
    if missing:
        raise IncompleteError(
            f"{folder}: the optimizer's state is incomplete, {format_names(missing)} missing",
            hint="the files are damaged or of several checkpoints; save the optimizer again into an empty folder",
            missing=list(missing),
        )


def read_values(folder: Path, locations: Mapping[str, StorageLocation | None]) -> dict[str, bytes]:
    """Return the pickles of values that are numbers, text, and tables of those.

    torch loads such values with a full unpickler, so that one which could do more must not be handed on.

    Args:
        folder: of the optimizer's checkpoint.
        locations: where each value is saved, by its name.

    Raises:
        HeaderError: a value is anything else, or is saved nowhere.
        IncompleteError: a file is missing or cut short.
        CheckpointError: a link leads out of the folder.
    """
    known = {name: _require_location(folder, name, place) for name, place in locations.items()}
    ordered = sorted(known.items(), key=lambda row: (row[1].file, row[1].offset))
    found: dict[str, bytes] = {}
    for file, rows in groupby(ordered, key=lambda row: row[1].file):
        with open_distcp_file(folder, file) as region:
            found |= {name: _read_plain_value(locate_archive(place, region), name) for name, place in rows}
    return {name: found[name] for name in locations}


def _require_location(folder: Path, name: str, location: StorageLocation | None) -> StorageLocation:
    if location is None:
        raise HeaderError(
            f"{folder / METADATA}: {name!r} is saved nowhere",
            hint="the file is damaged; copy or save it again",
            file=str(folder / METADATA),
            name=name,
        )
    return location


def _read_plain_value(archive: BoundedFile, name: str) -> bytes:
    """Return the pickle in an archive, if nothing but plain values come of it."""
    pickled = read_data_pickle(archive)
    where = f"{archive.file}, the value {name!r} saved at byte {archive.start}"
    if not _is_plain(read_pickle(pickled, (), where)):
        raise archive.error("is not a plain value")
    return pickled


def _is_plain(value: object) -> bool:
    """Return whether a value is made of plain ones; lists may hold themselves, so each is looked at once."""
    waiting, seen = [value], set[int]()
    while waiting:
        value = waiting.pop()
        if isinstance(value, PickledCall):
            return False
        if isinstance(value, list | tuple | PickledDict) and id(value) not in seen:
            seen.add(id(value))
            waiting += [part for pair in value.pairs for part in pair] if isinstance(value, PickledDict) else value
    return True


_SUFFIX = ".distcp"


@dataclass(frozen=True)
class OptimizerCheckpoint:
    """The metadata of an optimizer's checkpoint.

    Args:
        folder: where it lies in the model's folder, `.` for the folder itself.
        metadata: what the metadata list.
        prefix: what stands before all names.
        files: all of this kind in the folder, relative to the model's; those of an earlier save, which the metadata do
            not name, would be in the way of those that are written.
    """

    folder: str
    metadata: DcpMetadata
    prefix: str
    files: frozenset[str]

    @property
    def current_files(self) -> frozenset[str]:
        """The files that the metadata name, and their own."""
        return frozenset(str(PurePosixPath(self.folder) / name) for name in (METADATA, *self.metadata.files))


def find_optimizer(checkpoint: Checkpoint) -> OptimizerCheckpoint | None:
    """Return where an optimizer's state lies among a checkpoint's side files, None where there is none.

    Raises:
        HeaderError: metadata lie.
        CheckpointError: there are several.
    """
    places = [
        PurePosixPath(name).parent for name in checkpoint.side_files.copied if PurePosixPath(name).name == METADATA
    ]
    found = [one for place in places if (one := _find_in_folder(checkpoint, place)) is not None]
    if len(found) > 1:
        raise CheckpointError(
            f"{checkpoint.folder}: holds the state of several optimizers, in {format_names([one.folder for one in found])}",
            hint="keep the one that goes with the weights, and move the others away",
            folders=[one.folder for one in found],
        )
    return found[0] if found else None


def read_optimizer(checkpoint: Checkpoint, optimizer: OptimizerCheckpoint, model: PreTrainedModel) -> OptimizerState:
    """Read an optimizer's state, no tensor.

    Args:
        checkpoint: of the model's checkpoint.
        optimizer: the optimizer's metadata.
        model: that both are of, on meta.

    Raises:
        MismatchError: it is of another model.
        ConversionError: a tensor has neither its parameter's shape nor one element.
        IncompleteError: a file, a state or part of one is missing.
        HeaderError: metadata or archives lie, or a hyperparameter is no plain value.
        CheckpointError: a link leads out of the folder.
    """
    folder = checkpoint.folder / optimizer.folder
    shapes = {name: tuple(row.shape) for name, row in model.named_parameters(remove_duplicate=False)}
    names = _split_names(optimizer, shapes, folder)
    check_listed_keys(
        [name for name in optimizer.metadata.key_paths if name.startswith(optimizer.prefix)], names, folder
    )
    parameters = dict(_match_shapes(names, optimizer.metadata.shapes, shapes, folder))
    values = read_values(folder, optimizer.metadata.non_tensors)
    check_states_complete(names, values, shapes, folder)
    chunks = [
        replace(chunk, stored_name=f"optimizer/{chunk.stored_name}")
        for chunk in read_chunks(folder, optimizer.metadata.chunks)
    ]
    forms, dtypes = (
        join_chunks(chunks, optimizer.metadata.shapes),
        find_dtypes((chunk.name, chunk.stored) for chunk in chunks),
    )
    with_state = {row.parameter for row in names.values() if row.section == "state"}
    return OptimizerState(
        folder=optimizer.folder,
        tensors={
            name: TensorInfo("parameter" if name in parameters else "carried", dtypes[name], form.shape)
            for name, form in forms.items()
        },
        parameters=parameters,
        tensor_maps=forms,
        chunks={chunk.stored_name: chunk.stored for chunk in chunks},
        values=values,
        paths={name: path for name, path in optimizer.metadata.key_paths.items() if name in names},
        stateless=tuple(name for name, _ in model.named_parameters() if name not in with_state),
    )


def _find_in_folder(checkpoint: Checkpoint, folder: PurePosixPath) -> OptimizerCheckpoint | None:
    saved = read_metadata(checkpoint.folder / folder)
    prefix = find_prefix([*saved.shapes, *saved.non_tensors])
    if prefix is None:
        return None
    beside = (name for name in checkpoint.side_files.copied if PurePosixPath(name).parent == folder)
    files = (name for name in beside if name.endswith((METADATA, _SUFFIX)))
    return OptimizerCheckpoint(str(folder), saved, prefix, frozenset(files))


def _split_names(optimizer: OptimizerCheckpoint, parameters: Mapping[str, Shape], folder: Path) -> dict[str, SavedName]:
    """Return the parts of every saved name."""
    names = [*optimizer.metadata.shapes, *optimizer.metadata.non_tensors]
    parts = {name: _split_prefixed_name(name, optimizer.prefix, parameters) for name in names}
    strange = [name for name, row in parts.items() if row is None]
    if strange:
        raise MismatchError(
            f"{folder / METADATA}: {format_names(strange)} belong to no parameter of the model",
            hint="the optimizer's state is of another model; save it beside the weights it was trained with",
            names=strange,
        )
    return {name: row for name, row in parts.items() if row is not None}


def _split_prefixed_name(name: str, prefix: str, parameters: Mapping[str, Shape]) -> SavedName | None:
    return split_name(name.removeprefix(prefix), parameters) if name.startswith(prefix) else None


def _match_shapes(
    names: Mapping[str, SavedName], stored: Mapping[str, Shape], parameters: Mapping[str, Shape], folder: Path
) -> Iterator[tuple[str, str]]:
    """Yield each state that has its parameter's shape, with that parameter; others must be single elements."""
    for name, shape in stored.items():
        parameter = names[name].parameter if names[name].section == "state" else None
        if parameter is not None and shape == parameters[parameter]:
            yield name, parameter
        elif prod(shape) != 1:
            raise ConversionError(
                f"{folder / METADATA}: {name} is {list(shape)}, neither one element nor as large as its parameter"
                + (f", {list(parameters[parameter])}" if parameter is not None else ""),
                hint="it is of another model, or of an optimizer whose state is not laid out like its parameters, "
                "which cannot be resharded: leave it out with `optimizer=False`",
                name=name,
                shape=list(shape),
            )
