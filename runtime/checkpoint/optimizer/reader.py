"""Reading the state of an optimizer saved beside its model: `.distcp` files with fully qualified names.

A saved name is like `optimizer.state.PARAMETER.exp_avg`.

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
from runtime.checkpoint.dcp.chunks import join_chunks
from runtime.checkpoint.dcp.metadata import DcpMetadata, StorageLocation, read_metadata
from runtime.checkpoint.dcp.storage import locate_archive, open_distcp_file, read_chunks
from runtime.checkpoint.files.file_names import METADATA
from runtime.checkpoint.files.safetensors import find_dtypes
from runtime.checkpoint.pickled.archive import BoundedFile, read_archive
from runtime.checkpoint.pickled.pickle import PickledCall, PickledDict, read_pickle
from runtime.tensor_map.tensor_map import Shape

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["OptimizerCheckpoint", "find_optimizer", "read_optimizer"]

_PREFIXES = ("optimizer.", "")
_SECTIONS = ("state", "param_groups")


@dataclass(frozen=True, slots=True)
class _SavedName:
    """A saved name, split into its parts.

    Args:
        section: `state`, or `param_groups` for hyperparameters.
        parameter: the parameter's name, None for the hyperparameters of a numbered group.
        entry: the name of the state or hyperparameter, such as `exp_avg`.
    """

    section: str
    parameter: str | None
    entry: str


def _find_prefix(names: Collection[str]) -> str | None:
    """Return the prefix of the names of an optimizer's state, None if the names include no such state."""
    for prefix in _PREFIXES:
        starts = tuple(f"{prefix}{section}." for section in _SECTIONS)
        if any(name.startswith(starts) for name in names):
            return prefix
    return None


def _split_name(name: str, parameters: Mapping[str, object]) -> _SavedName | None:
    """Split a saved name into its parts.

    Args:
        name: the saved name, without the prefix of all names.
        parameters: the model's parameters by name.

    Returns:
        The parts, None if the name belongs to no parameter of the model.
    """
    section, _, rest = name.partition(".")
    if section not in _SECTIONS:
        return None
    parts = rest.split(".")
    for count in range(len(parts) - 1, 0, -1):
        parameter = ".".join(parts[:count])
        if parameter in parameters:
            return _SavedName(section, parameter, ".".join(parts[count:]))
    if section == "param_groups" and parts[0].isdecimal():
        return _SavedName(section, None, rest)
    return None


_Settings = tuple[int, tuple[tuple[str, bytes], ...]]
"""What decides which states a parameter has: its number of dims, and its hyperparameters with their pickles."""


def _check_states_complete(
    names: Mapping[str, _SavedName], values: Mapping[str, bytes], parameters: Mapping[str, Shape], folder: Path
) -> None:
    """Refuse a parameter without a state that other parameters of as many dims and equal hyperparameters have.

    Parameters without any state are frozen, and hyperparameters of numbered groups are not tied to parameters.

    Args:
        names: all saved names, split.
        values: the pickles of everything that is not a tensor, by saved name.
        parameters: the shapes of the model's parameters.
        folder: the folder of the optimizer's state.

    Raises:
        IncompleteError: there is such a parameter.
    """
    settings = _read_settings(names, values, parameters)
    states: defaultdict[str, set[str]] = defaultdict(set)
    for row in names.values():
        if row.section == "state" and row.parameter in settings:
            states[row.parameter].add(row.entry)
    expected: defaultdict[_Settings, set[str]] = defaultdict(set)
    for parameter, entries in states.items():
        expected[settings[parameter]] |= entries
    missing = [
        f"{entry} of {parameter}"
        for parameter, entries in states.items()
        for entry in sorted(expected[settings[parameter]] - entries)
    ]
    _check_none_missing(missing, folder)


def _read_settings(
    names: Mapping[str, _SavedName], values: Mapping[str, bytes], parameters: Mapping[str, Shape]
) -> dict[str, _Settings]:
    """Return the settings of each parameter that has hyperparameters of its own."""
    settings: defaultdict[str, list[tuple[str, bytes]]] = defaultdict(list)
    for name, row in names.items():
        if row.section == "param_groups" and row.parameter is not None:
            settings[row.parameter].append((row.entry, values.get(name, b"")))
    return {name: (len(parameters[name]), tuple(sorted(pairs))) for name, pairs in settings.items()}


def _check_none_missing(missing: Sequence[str], folder: Path) -> None:
    if missing:
        raise IncompleteError(
            f"{folder}: the optimizer's state is incomplete, {format_names(missing)} missing",
            hint="the files are damaged or of several checkpoints; save the optimizer again into an empty folder",
            missing=list(missing),
        )


def _read_values(folder: Path, locations: Mapping[str, StorageLocation | None]) -> dict[str, bytes]:
    """Return the pickles of the values that are not tensors, each checked to be numbers, text or containers of these.

    torch loads these values with an unrestricted unpickler, so a pickle that could do more must not be passed on.

    Args:
        folder: the folder of the optimizer's state.
        locations: where each value is saved, by saved name.

    Raises:
        HeaderError: a value is not plain data, or is not saved.
        IncompleteError: a file is missing or truncated.
        CheckpointError: a link leads out of the folder.
    """
    known = {name: _require_location(folder, name, location) for name, location in locations.items()}
    ordered = sorted(known.items(), key=lambda row: (row[1].file, row[1].offset))
    pickles: dict[str, bytes] = {}
    for file_name, rows in groupby(ordered, key=lambda row: row[1].file):
        with open_distcp_file(folder, file_name) as file:
            pickles |= {name: _read_plain_value(locate_archive(location, file), name) for name, location in rows}
    return {name: pickles[name] for name in locations}


def _require_location(folder: Path, name: str, location: StorageLocation | None) -> StorageLocation:
    if location is None:
        raise HeaderError(
            f"{folder / METADATA}: {name!r} is not saved",
            hint="the file is damaged; copy or save it again",
            file=str(folder / METADATA),
            name=name,
        )
    return location


def _read_plain_value(archive: BoundedFile, name: str) -> bytes:
    """Return the pickle in an archive, after checking that it contains plain data only."""
    pickled = read_archive(archive).read_description()
    where = f"{archive.file}, the value {name!r} saved at byte {archive.start}"
    if not _is_plain(read_pickle(pickled, (), where)):
        raise archive.error("is not plain data")
    return pickled


def _is_plain(value: object) -> bool:
    """Return whether a value contains plain data only. Lists may contain themselves, so each is visited once."""
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
    """The metadata of an optimizer's state.

    Args:
        folder: the state's folder relative to the model's, `.` if they are the same.
        metadata: the content of `.metadata`.
        prefix: the prefix of all saved names.
        files: all `.distcp` and `.metadata` files of that folder, relative to the model's. They include those of an
            earlier save, which the metadata do not name; copied, these would collide with the files that are written.
    """

    folder: str
    metadata: DcpMetadata
    prefix: str
    files: frozenset[str]

    @property
    def current_files(self) -> frozenset[str]:
        """The files that the metadata name, and `.metadata` itself."""
        return frozenset(str(PurePosixPath(self.folder) / name) for name in (METADATA, *self.metadata.files))


def find_optimizer(checkpoint: Checkpoint) -> OptimizerCheckpoint | None:
    """Find an optimizer's state among a checkpoint's side files; return None if there is none.

    Raises:
        HeaderError: the metadata are damaged.
        CheckpointError: there are several optimizers.
    """
    paths = [PurePosixPath(name) for name in checkpoint.side_files.copied]
    candidates = [_find_in_folder(checkpoint, path.parent) for path in paths if path.name == METADATA]
    optimizers = [optimizer for optimizer in candidates if optimizer is not None]
    if len(optimizers) > 1:
        folders = [optimizer.folder for optimizer in optimizers]
        raise CheckpointError(
            f"{checkpoint.folder}: contains the state of several optimizers, in {format_names(folders)}",
            hint="keep the one that belongs to the weights, and move the others away",
            folders=folders,
        )
    return optimizers[0] if optimizers else None


def read_optimizer(checkpoint: Checkpoint, optimizer: OptimizerCheckpoint, model: PreTrainedModel) -> OptimizerState:
    """Read an optimizer's state up to its headers.

    Args:
        checkpoint: the model's checkpoint.
        optimizer: the optimizer's metadata.
        model: the model, on any device.

    Raises:
        MismatchError: the state belongs to another model.
        ConversionError: a tensor has neither its parameter's shape nor a single element.
        IncompleteError: a file, a state or part of one is missing.
        HeaderError: metadata or archives are damaged, or a hyperparameter is not plain data.
        CheckpointError: a link leads out of the folder.
    """
    folder = checkpoint.folder / optimizer.folder
    shapes = {name: tuple(row.shape) for name, row in model.named_parameters(remove_duplicate=False)}
    names = _split_names(optimizer, shapes, folder)
    listed = (name for name in optimizer.metadata.key_paths if name.startswith(optimizer.prefix))
    _check_none_missing([name for name in listed if name not in names], folder)
    parameters = dict(_match_shapes(names, optimizer.metadata.shapes, shapes, folder))
    values = _read_values(folder, optimizer.metadata.non_tensors)
    _check_states_complete(names, values, shapes, folder)
    chunks = [
        replace(chunk, stored_name=f"optimizer/{chunk.stored_name}")
        for chunk in read_chunks(folder, optimizer.metadata.chunks)
    ]
    tensor_maps = join_chunks(chunks, optimizer.metadata.shapes)
    dtypes = find_dtypes((chunk.name, chunk.stored) for chunk in chunks)
    with_state = {row.parameter for row in names.values() if row.section == "state"}
    return OptimizerState(
        folder=optimizer.folder,
        tensors={
            name: TensorInfo("parameter" if name in parameters else "carried", dtypes[name], tensor_map.shape)
            for name, tensor_map in tensor_maps.items()
        },
        parameters=parameters,
        tensor_maps=tensor_maps,
        chunks={chunk.stored_name: chunk.stored for chunk in chunks},
        values=values,
        paths={name: path for name, path in optimizer.metadata.key_paths.items() if name in names},
        stateless=tuple(name for name, _ in model.named_parameters() if name not in with_state),
    )


def _find_in_folder(checkpoint: Checkpoint, folder: PurePosixPath) -> OptimizerCheckpoint | None:
    saved = read_metadata(checkpoint.folder / folder)
    prefix = _find_prefix([*saved.shapes, *saved.non_tensors])
    if prefix is None:
        return None
    siblings = (name for name in checkpoint.side_files.copied if PurePosixPath(name).parent == folder)
    files = frozenset(name for name in siblings if name.endswith((METADATA, _SUFFIX)))
    return OptimizerCheckpoint(str(folder), saved, prefix, files)


def _split_names(
    optimizer: OptimizerCheckpoint, parameters: Mapping[str, Shape], folder: Path
) -> dict[str, _SavedName]:
    """Split every saved name."""
    names = [*optimizer.metadata.shapes, *optimizer.metadata.non_tensors]
    parts = {name: _split_prefixed_name(name, optimizer.prefix, parameters) for name in names}
    if unknown := [name for name, row in parts.items() if row is None]:
        raise MismatchError(
            f"{folder / METADATA}: {format_names(unknown)} belong to no parameter of the model",
            hint="the optimizer's state belongs to another model; save it beside the weights it was trained with",
            names=unknown,
        )
    return {name: row for name, row in parts.items() if row is not None}


def _split_prefixed_name(name: str, prefix: str, parameters: Mapping[str, Shape]) -> _SavedName | None:
    return _split_name(name.removeprefix(prefix), parameters) if name.startswith(prefix) else None


def _match_shapes(
    names: Mapping[str, _SavedName], stored: Mapping[str, Shape], parameters: Mapping[str, Shape], folder: Path
) -> Iterator[tuple[str, str]]:
    """Yield each state of its parameter's shape, with that parameter; all others must have a single element."""
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
