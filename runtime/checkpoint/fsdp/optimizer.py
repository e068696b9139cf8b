"""The optimizer's states that FSDP jobs pickle beside their rank files, such as `optim_world_size_8_rank_0.pt`.

They are what `optimizer.state_dict()` returns: parameters are numbered and have no names. The names come from the order
of the model's parameters, in which the job passed them on, held against the shape of every state. Where two ways fit,
the states are refused, because a wrong one raises no error in training.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from plans.errors import ConversionError, HeaderError, MismatchError
from plans.text import format_names, shorten
from runtime.checkpoint.checkpoint import Checkpoint, KeyPath, OptimizerState, TensorInfo
from runtime.checkpoint.dcp.chunks import join_chunks
from runtime.checkpoint.files.safetensors import find_dtypes
from runtime.checkpoint.fsdp.dtensor import RankTensor, RankTensorParser
from runtime.checkpoint.fsdp.parameter_order import match_parameters
from runtime.checkpoint.fsdp.reader import build_rank_chunk, check_mesh, find_rank_files
from runtime.checkpoint.pickled.pickle import PickledDict, describe_pickle
from runtime.checkpoint.pickled.state_dict import get_pairs, open_archive
from runtime.tensor_map.tensor_map import Shape

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["find_rank_optimizer", "read_rank_optimizer"]

_PREFIX = "optimizer"
_WITHOUT = "leave the optimizer out with `optimizer=False`, or save it with `get_optimizer_state_dict`, which names it"


@dataclass(frozen=True)
class _RankState:
    """The state of an optimizer in a rank's file.

    Args:
        tensors: the tensors of each parameter's state, by its number and their name.
        groups: the numbers of the parameters in each group.
        settings: the hyperparameters of each group.
    """

    tensors: Mapping[int, Mapping[str, RankTensor]]
    groups: tuple[tuple[int, ...], ...]
    settings: tuple[Mapping[str, object], ...]

    @property
    def layout(self) -> object:
        """What must be equal on all ranks."""
        shapes = {
            number: {entry: tensor.shape for entry, tensor in row.items()} for number, row in self.tensors.items()
        }
        return shapes, self.groups, self.settings


def find_rank_optimizer(folder: Path) -> dict[int, Path]:
    """Return the file of an optimizer's state of every rank; nothing if there are none.

    Raises:
        IncompleteError: a rank's file is missing.
        MismatchError: there are files of several numbers of ranks.
        CheckpointError: a file is a link that leads out of the folder.
    """
    return find_rank_files(folder, "optim")


def read_rank_optimizer(checkpoint: Checkpoint, files: Mapping[int, Path], model: PreTrainedModel) -> OptimizerState:
    """Read the state of an optimizer up to the description of its tensors; replicas are compared byte for byte.

    Args:
        checkpoint: the model's checkpoint, of rank files.
        files: the files by rank.
        model: the model, on any device.

    Raises:
        ConversionError: the parameters are numbered in a way that no order, or more than one, explains.
        MismatchError: ranks contradict one another.
        HeaderError: a file is damaged, or a hyperparameter is no plain data.
    """
    states = {rank: _read_file(file) for rank, file in files.items()}
    for rank, state in states.items():
        if state.layout != states[0].layout:
            raise MismatchError(
                f"{files[rank]}: the optimizer's state is laid out otherwise than in {files[0].name}",
                hint="the files belong to several checkpoints; name a folder with those of one",
                rank=rank,
            )
        check_mesh(files[rank], rank, (tensor for row in state.tensors.values() for tensor in row.values()))
    names = _name_parameters(checkpoint, files[0], states[0], model)
    chunks = [
        build_rank_chunk(files[rank], rank, _join(names[number], entry), tensor)
        for rank, state in states.items()
        for number, row in state.tensors.items()
        for entry, tensor in row.items()
    ]
    shapes = {
        _join(names[number], entry): tensor.shape
        for number, row in states[0].tensors.items()
        for entry, tensor in row.items()
    }
    tensor_maps = join_chunks(chunks, shapes)
    dtypes = find_dtypes((chunk.name, chunk.stored) for chunk in chunks)
    of_model = {name: tuple(row.shape) for name, row in model.named_parameters(remove_duplicate=False)}
    parameters = {
        name: parameter
        for number, parameter in names.items()
        for entry in states[0].tensors.get(number, {})
        if shapes[name := _join(parameter, entry)] == of_model[parameter]
    }
    values = dict(_iter_values(states[0], names))
    with_state = {names[number] for number in states[0].tensors}
    return OptimizerState(
        folder=".",
        tensors={
            name: TensorInfo("parameter" if name in parameters else "carried", dtypes[name], shape)
            for name, shape in shapes.items()
        },
        parameters=parameters,
        tensor_maps=tensor_maps,
        chunks={chunk.stored_name: chunk.stored for chunk in chunks},
        values=values,
        paths={name: _split_path(name) for name in (*shapes, *values)},
        stateless=tuple(name for name, _ in model.named_parameters() if name not in with_state),
    )


def _join(parameter: str, entry: str) -> str:
    return f"{_PREFIX}.state.{parameter}.{entry}"


def _split_path(name: str) -> KeyPath:
    """Return the keys that lead to a value, as `save_optimizer_distributed` of transformers nests them."""
    return _PREFIX, name.removeprefix(f"{_PREFIX}.")


def _iter_values(state: _RankState, names: Mapping[int, str]) -> Iterator[tuple[str, bytes]]:
    """Yield the hyperparameters of each parameter, which torch loads from pickles of their own."""
    for numbers, settings in zip(state.groups, state.settings, strict=True):
        pickled = {key: pickle.dumps(value, protocol=2) for key, value in settings.items()}
        for number in numbers:
            for key, value in pickled.items():
                yield f"{_PREFIX}.param_groups.{names[number]}.{key}", value


def _name_parameters(checkpoint: Checkpoint, file: Path, state: _RankState, model: PreTrainedModel) -> dict[int, str]:
    """Return the name of each numbered parameter, by the only order that all shapes confirm."""
    if not checkpoint.saved_order:
        raise ConversionError(
            f"{file}: the parameters of this optimizer were those of the hub form, one for each expert",
            hint=_WITHOUT,
            file=str(file),
        )
    shapes = {name: tuple(row.shape) for name, row in model.named_parameters()}
    saved = {name: shapes[name] for name in checkpoint.saved_order if name in shapes}
    wanted = [[_find_shape(state.tensors.get(number, {})) for number in numbers] for numbers in state.groups]
    found: list[list[list[str]]] = []
    for parameters in (saved, shapes):
        ways = match_parameters(wanted, parameters)
        if ways is None:
            raise _ambiguous_error(file, "too many ways to follow")
        found += (way for way in ways if way not in found)
    if not found:
        total = sum(map(len, state.groups))
        raise ConversionError(
            f"{file}: the optimizer has {total} parameters, whose shapes are not those of the model's "
            f"{len(shapes)} in any order that frozen ones leave",
            hint=_WITHOUT,
            file=str(file),
        )
    if len(found) > 1:
        differing = [
            name
            for one, other in zip(found[0], found[1], strict=True)
            for name, second in zip(one, other, strict=True)
            if name != second
        ]
        raise _ambiguous_error(file, f"the state of {format_names(differing)} could be that of another")
    return {
        number: name
        for numbers, names in zip(state.groups, found[0], strict=True)
        for number, name in zip(numbers, names, strict=True)
    }


def _ambiguous_error(file: Path, what: str) -> ConversionError:
    return ConversionError(
        f"{file}: the optimizer numbers its parameters, and more than one order of the model's fits: {what}",
        hint=_WITHOUT,
        file=str(file),
    )


def _find_shape(row: Mapping[str, RankTensor]) -> Shape | None:
    """Return the shape of a parameter by the tensors of its state, of which a step count says nothing."""
    return max((tensor.shape for tensor in row.values() if tensor.shape), key=len, default=None)


def _read_file(file: Path) -> _RankState:
    with open_archive(file) as archive:
        parser = RankTensorParser()
        content = dict(_iter_named(describe_pickle(archive.read_description(), str(file)), file))
        tensors: dict[int, dict[str, RankTensor]] = {}
        for number, row in _get_pairs(content.get("state"), file):
            if type(number) is not int:
                raise _damaged_error(file, f"names a parameter {shorten(repr(number))}")
            tensors[number] = {}
            for entry, value in _iter_named(row, file):
                if (tensor := parser.parse(archive, value)) is None:
                    raise _damaged_error(file, f"has a state {shorten(repr(entry))} that is no tensor")
                tensors[number][entry] = tensor
    groups, settings = _read_groups(content.get("param_groups"), file)
    numbers = [number for group in groups for number in group]
    if len(set(numbers)) < len(numbers) or not tensors.keys() <= set(numbers):
        raise _damaged_error(file, "numbers a parameter twice, or has a state of none")
    return _RankState(tensors, groups, settings)


def _read_groups(value: object, file: Path) -> tuple[tuple[tuple[int, ...], ...], tuple[Mapping[str, object], ...]]:
    if not isinstance(value, list) or not value:
        raise _damaged_error(file, "has no groups of parameters")
    groups: list[tuple[int, ...]] = []
    settings: list[Mapping[str, object]] = []
    for row in value:
        entries = dict(_iter_named(row, file))
        numbers = entries.pop("params", None)
        if not isinstance(numbers, list) or not all(type(number) is int for number in numbers):
            raise _damaged_error(file, "has a group without the numbers of its parameters")
        groups.append(tuple(numbers))
        settings.append({key: _to_plain(entry, key, file) for key, entry in entries.items()})
    return tuple(groups), tuple(settings)


def _to_plain(value: object, key: str, file: Path) -> object:
    """Return a hyperparameter, which must be a number, text or a list of these, because torch unpickles it."""
    if isinstance(value, list | tuple):
        return type(value)(_to_plain(item, key, file) for item in value)
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise _damaged_error(file, f"has a hyperparameter {shorten(repr(key))} that is no plain data")


def _iter_named(value: object, file: Path) -> Iterator[tuple[str, object]]:
    for key, entry in _get_pairs(value, file):
        if not isinstance(key, str):
            raise _damaged_error(file, f"has a key {shorten(repr(key))} that is no name")
        yield key, entry


def _get_pairs(value: object, file: Path) -> Sequence[tuple[object, object]]:
    pairs = value.pairs if isinstance(value, PickledDict) else get_pairs(value)
    if pairs is None:
        raise _damaged_error(file, "is not laid out as `optimizer.state_dict()` is")
    return pairs


def _damaged_error(file: Path, what: str) -> HeaderError:
    return HeaderError(f"{file}: {what}", hint=_WITHOUT, file=str(file))
