"""Hyperparameters in an optimizer's checkpoint: each is a pickle of its own, read as data and never loaded."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from pathlib import Path

from plans.errors import HeaderError
from runtime.checkpoint.dcp.archive import read_data_pickle
from runtime.checkpoint.dcp.metadata import StorageLocation
from runtime.checkpoint.dcp.names import METADATA
from runtime.checkpoint.dcp.pickle import PickledCall, PickledDict, read_pickle
from runtime.checkpoint.dcp.storage import locate_archive, open_distcp_file
from runtime.checkpoint.dcp.zip import BoundedFile

__all__ = ["read_values"]


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
