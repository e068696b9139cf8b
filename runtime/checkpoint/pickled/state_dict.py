"""State dicts that `torch.save` wrote: which tensors they name, and what else is saved beside them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from plans.errors import CheckpointError, HeaderError
from plans.text import format_names, shorten
from runtime.checkpoint.files.reading import open_descriptor, open_regular
from runtime.checkpoint.files.side_files import LeftBehind
from runtime.checkpoint.pickled.archive import Archive, BoundedFile, read_archive
from runtime.checkpoint.pickled.pickle import Global, PickledCall, PickledDict, describe_pickle
from runtime.checkpoint.pickled.tensors import find_unknown_dtype, unknown_dtype_error
from runtime.formats import PREFIX_BYTES, check_not_other_format

__all__ = ["StateDict", "get_pairs", "open_archive", "read_state_dict"]

_Tensor = TypeVar("_Tensor")
_Pairs = Sequence[tuple[object, object]]

_DICTS = ("collections.OrderedDict", "collections.defaultdict", "builtins.dict", "__builtin__.dict")
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
"""The keys under which training scripts save a model beside other state."""

_MAX_WRAPPERS = 4
_MAX_STEPS = 2**23


@dataclass(frozen=True)
class StateDict(Generic[_Tensor]):
    """A state dict, read up to the description of its tensors.

    Args:
        tensors: its tensors by name.
        left_behind: what else the file contains.
    """

    tensors: dict[str, _Tensor]
    left_behind: tuple[LeftBehind, ...]


def read_state_dict(file: Path, parse: Callable[[Archive, object], _Tensor | None]) -> StateDict[_Tensor]:
    """Read the description of a state dict; no tensor is read, and nothing that the file names is imported or called.

    The state dict is the whole file, or what it saves under a key such as `model` or `state_dict`.

    Args:
        file: the file.
        parse: returns a value's tensor, None if the value is not one that it knows.

    Raises:
        HeaderError: the file is damaged, or a tensor is of a kind that is not read.
        IncompleteError: its content is of another format.
        CheckpointError: it contains no state dict or several, is not a regular file, or cannot be read.
    """
    with open_archive(file) as archive:
        search = _Search(file, _MAX_STEPS)
        pairs, left_behind = search.find_state_dict(describe_pickle(archive.read_description(), str(file)))
        tensors: dict[str, _Tensor] = {}
        for key, value in pairs:
            name = _check_name(key, tensors, file)
            if (tensor := parse(archive, value)) is not None:
                tensors[name] = tensor
            elif isinstance(value, PickledCall) and search.is_tensor(value):
                raise _unknown_tensor_error(file, name, value)
            else:
                reason = "no tensor, but contains some" if search.reaches_storage(value) else "no tensor"
                left_behind.append(LeftBehind(f"{name!r} in {file.name}", reason, is_file=False))
        return StateDict(tensors, tuple(left_behind))


def get_pairs(value: object) -> _Pairs | None:
    """Return the keys and values of a pickled dict of any common class, None if the value is anything else."""
    if isinstance(value, PickledDict):
        return value.pairs
    if isinstance(value, PickledCall) and value.callee in _DICTS:
        return value.pairs or ()
    return None


@contextmanager
def open_archive(file: Path) -> Iterator[Archive]:
    """Open a file that torch.save wrote, and give its archive.

    Raises:
        HeaderError: the archive is damaged.
        IncompleteError: its content is of another format.
        CheckpointError: it is not a regular file, or cannot be read.
    """
    with open_regular(file) as stream:
        start = stream.read(PREFIX_BYTES)
    if not start.startswith(b"PK"):  # the mark of the archives that torch.save writes
        check_not_other_format(file, start)
    with open_descriptor(file) as descriptor:
        yield read_archive(BoundedFile(descriptor, file, 0, os.fstat(descriptor).st_size, is_whole=True))


@dataclass
class _Search:
    """Searches the values of one file for tensors, in a bounded number of steps however often values are shared."""

    file: Path
    steps: int

    def find_state_dict(self, value: object) -> tuple[_Pairs, list[LeftBehind]]:
        """Return the pairs of the one state dict that a pickled value is or contains, and what lies beside it."""
        left_behind: list[LeftBehind] = []
        for _ in range(_MAX_WRAPPERS):
            pairs = get_pairs(value)
            if pairs is None or self.is_state_dict(pairs):
                break
            wrapped = [(key, inner) for key, inner in pairs if key in _WRAPPERS and self.reaches_storage(inner)]
            if len(wrapped) != 1:
                break
            left_behind += (
                LeftBehind(f"{shorten(key)!r} in {self.file.name}", "beside the model", is_file=False)
                for key, _ in pairs
                if isinstance(key, str) and key != wrapped[0][0]
            )
            value = wrapped[0][1]
        pairs = get_pairs(value)
        if pairs is None or not self.is_state_dict(pairs):
            raise _no_state_dict_error(self.file, value)
        return pairs, left_behind

    def is_state_dict(self, pairs: _Pairs) -> bool:
        """Return whether a dict has tensors of its own, of whatever kind."""
        return any(self.is_tensor(value) for _, value in pairs)

    def is_tensor(self, value: object) -> bool:
        """Return whether a value is an object, and not a dict or list, that the bytes of a tensor are needed for."""
        return isinstance(value, PickledCall) and get_pairs(value) is None and self.reaches_storage(value)

    def reaches_storage(self, value: object) -> bool:
        """Return whether the bytes of a tensor are needed for a value."""
        waiting, seen = [value], set[int]()
        while waiting:
            current = waiting.pop()
            if isinstance(current, PickledCall) and current.callee == "persistent":
                return True
            if not isinstance(current, PickledCall | PickledDict | list | tuple) or id(current) in seen:
                continue
            seen.add(id(current))
            for part in _get_parts(current):
                waiting.append(part)
                self.steps -= 1
            if self.steps < 0:
                raise HeaderError(
                    f"{self.file}: more values beside its tensors than can be searched",
                    hint="save the model's weights alone: `torch.save(model.state_dict(), …)`",
                    file=str(self.file),
                )
        return False


def _get_parts(value: PickledCall | PickledDict | list[object] | tuple[object, ...]) -> Iterator[object]:
    if isinstance(value, PickledCall):
        yield from (value.state, *(value.values or ()))
    if isinstance(value, PickledCall | PickledDict):
        for pair in value.pairs or ():
            yield from pair
    else:
        yield from value
    if isinstance(value, PickledCall):
        yield value.arguments


def _check_name(key: object, known: dict[str, _Tensor], file: Path) -> str:
    if not isinstance(key, str) or key in known:
        what = f"{shorten(repr(key))} twice" if isinstance(key, str) else "something without a name"
        raise HeaderError(
            f"{file}: the state dict contains {what}", hint="the file is damaged; copy or save it again", file=str(file)
        )
    return key


def _unknown_tensor_error(file: Path, name: str, value: PickledCall) -> CheckpointError:
    if (dtype := find_unknown_dtype(value)) is not None:
        return unknown_dtype_error(file, name, dtype)
    match value:
        case PickledCall("torch._tensor._rebuild_from_type_v2", (_, Global(kind), *_)):
            pass
        case _:
            kind = value.callee
    kind = shorten(kind)
    return HeaderError(
        f"{file}: {shorten(repr(name))} is not a plain tensor but made by {kind}, which is not called",
        hint="save a plain tensor in its place, such as `tensor.full_tensor()` or `tensor.dequantize()` returns",
        file=str(file),
        tensor=name,
        callee=kind,
    )


def _no_state_dict_error(file: Path, value: object) -> CheckpointError:
    pairs = get_pairs(value)
    if pairs is None:
        kind = f"an object of {shorten(value.callee)}" if isinstance(value, PickledCall) else "no dict"
        what = f"contains {kind}, not a state dict"
    else:
        keys = [shorten(key) for key, _ in pairs if isinstance(key, str)]
        what = f"contains no tensors under their names, only {format_names(keys)}" if keys else "contains no tensors"
    return CheckpointError(
        f"{file}: {what}", hint="save the model's weights alone: `torch.save(model.state_dict(), …)`", file=str(file)
    )
