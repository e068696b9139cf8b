"""The names that an optimizer's state is saved under: `optimizer.state.PARAMETER.exp_avg`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

__all__ = ["SavedName", "find_prefix", "split_name"]

_PREFIXES = ("optimizer.", "")
_SECTIONS = ("state", "param_groups")


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
