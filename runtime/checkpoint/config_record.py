"""The entries of a checkpoint's config.json, compared with those that its manifest recorded when it was written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from plans.errors import CheckpointError
from runtime.checkpoint.checkpoint import Checkpoint
from runtime.checkpoint.files.file_names import CONFIG
from runtime.checkpoint.files.reading import read_at_most
from runtime.checkpoint.files.strict_json import is_nested_deeper
from runtime.checkpoint.manifest import MAX_CONFIG_DEPTH
from runtime.models.config_entries import ConfigDifference, compare_entries

__all__ = ["find_config_changes", "get_config_record", "read_config_entries"]

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
    return read_config_entries(checkpoint.folder)


def find_config_changes(checkpoint: Checkpoint) -> tuple[ConfigDifference, ...]:
    """Return the entries that make a checkpoint's config compute something else than the recorded one.

    There are none if no config was recorded or the folder has none.

    Raises:
        CheckpointError: the config cannot be read.
    """
    recorded = checkpoint.manifest.config if checkpoint.manifest else None
    entries = read_config_entries(checkpoint.folder) if recorded is not None else None
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
