"""What an optimizer's checkpoint holds, by the names it is saved under: `optimizer.state.PARAMETER.exp_avg`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from runtime.checkpoint.dcp.metadata import KeyPath
from runtime.checkpoint.files.safetensors import StoredTensor
from runtime.extents.forms import TensorMap

if TYPE_CHECKING:
    from runtime.checkpoint.content import TensorInfo

__all__ = ["OptimizerState", "SavedName", "find_prefix", "split_name"]

_PREFIXES = ("optimizer.", "")
_SECTIONS = ("state", "param_groups")


@dataclass(frozen=True)
class OptimizerState:
    """An optimizer's checkpoint read up to its headers.

    Args:
        folder: where it lies in the model's folder, `.` for the folder itself.
        tensors: by saved name; `parameter` for those that are laid out like their parameter, else `carried`.
        parameters: the name of each such tensor's parameter, by saved name.
        tensor_maps: of the tensors over the pieces.
        chunks: what files store.
        values: pickles of what is no tensor, by saved name; read as data and found to be nothing else.
        paths: keys of the nested tables that lead to what is saved, by its name.
        stateless: parameters of the model that have no state, frozen ones say.
    """

    folder: str
    tensors: Mapping[str, TensorInfo]
    parameters: Mapping[str, str]
    tensor_maps: Mapping[str, TensorMap] = field(repr=False)
    chunks: Mapping[str, StoredTensor] = field(repr=False)
    values: Mapping[str, bytes] = field(repr=False)
    paths: Mapping[str, KeyPath] = field(repr=False)
    stateless: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SavedName:
    """A saved name in its parts.

    Args:
        section: `state`, or `param_groups` for hyperparameters.
        parameter: that it is of; None for the hyperparameters of a numbered group.
        entry: what it is of that, `exp_avg`.
    """

    section: str
    parameter: str | None
    entry: str


def find_prefix(names: Collection[str]) -> str | None:
    """Return what stands before the names of an optimizer's state, None where none of the names is one's."""
    for prefix in _PREFIXES:
        starts = tuple(f"{prefix}{section}." for section in _SECTIONS)
        if any(name.startswith(starts) for name in names):
            return prefix
    return None


def split_name(name: str, parameters: Mapping[str, object]) -> SavedName | None:
    """Return the parts of a saved name.

    Args:
        name: without what stands before all of them.
        parameters: of the model by name.

    Returns:
        None where the name is of no parameter of the model.
    """
    section, _, rest = name.partition(".")
    if section not in _SECTIONS:
        return None
    parts = rest.split(".")
    for count in range(len(parts) - 1, 0, -1):
        parameter = ".".join(parts[:count])
        if parameter in parameters:
            return SavedName(section, parameter, ".".join(parts[count:]))
    if section == "param_groups" and parts[0].isdecimal():
        return SavedName(section, None, rest)
    return None
