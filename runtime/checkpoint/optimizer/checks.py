"""Whether an optimizer's checkpoint has all the state that training needs to go on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from plans.errors import IncompleteError
from runtime.checkpoint.dcp.chunks import Shape
from runtime.checkpoint.optimizer.state import SavedName
from runtime.wording import format_names

__all__ = ["check_listed_keys", "check_states_complete"]

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
