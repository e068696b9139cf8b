"""The names that an optimizer's state is saved under, such as `optimizer.state.PARAMETER.exp_avg`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

__all__ = ["SavedName", "find_prefix", "split_name"]

_PREFIXES = ("optimizer.", "")
_SECTIONS = ("state", "param_groups")


@dataclass(frozen=True, slots=True)
class SavedName:
    """A saved name, split into its parts.

    Args:
        section: `state`, or `param_groups` for hyperparameters.
        parameter: the parameter's name, None for the hyperparameters of a numbered group.
        entry: the name of the state or hyperparameter, such as `exp_avg`.
    """

    section: str
    parameter: str | None
    entry: str


def find_prefix(names: Collection[str]) -> str | None:
    """Return the prefix of the names of an optimizer's state, None if the names include no such state."""
    for prefix in _PREFIXES:
        starts = tuple(f"{prefix}{section}." for section in _SECTIONS)
        if any(name.startswith(starts) for name in names):
            return prefix
    return None


def split_name(name: str, parameters: Mapping[str, object]) -> SavedName | None:
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
            return SavedName(section, parameter, ".".join(parts[count:]))
    if section == "param_groups" and parts[0].isdecimal():
        return SavedName(section, None, rest)
    return None
