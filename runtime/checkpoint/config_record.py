"""What a checkpoint's config.json says, beside what it said when the checkpoint was laid out."""

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
    """Return what a manifest is to record of the config: what was recorded before, else what it says now.

    A record goes along with the tensors, as their digests do. One made anew of a config that has been changed would
    call the change right from then on, and no one would hear of it again; kept, `verify` and `validate` name it in
    whatever is made of the checkpoint, until the config is restored or a person takes the record out.

    Raises:
        CheckpointError: the config cannot be read.
    """
    if checkpoint.manifest is not None and checkpoint.manifest.config is not None:
        return checkpoint.manifest.config
    made = checkpoint.extra_files.get(CONFIG)
    path = checkpoint.folder / CONFIG
    return _parse_entries(made, path) if made is not None else read_config_entries(checkpoint.folder)


def find_config_changes(checkpoint: Checkpoint) -> tuple[ConfigDifference, ...]:
    """Return the entries by which a checkpoint's config says to compute something else than the recorded one.

    Nothing is said where nothing is recorded, or no config is there.

    Raises:
        CheckpointError: the config cannot be read.
    """
    recorded = checkpoint.manifest.config if checkpoint.manifest else None
    entries = read_config_entries(checkpoint.folder) if recorded is not None else None
    return compare_entries(entries, recorded) if entries is not None and recorded is not None else ()


def read_config_entries(folder: Path) -> dict[str, object] | None:
    """Return what a folder's config.json says, None where it has none.

    Raises:
        CheckpointError: it cannot be read, or is no config.
    """
    path = folder / CONFIG
    return _parse_entries(read_at_most(path, _MAX_BYTES), path) if path.exists() else None


def _parse_entries(text: bytes, path: Path) -> dict[str, object]:
    """Parse a config as transformers does, and in such a way that a manifest can say the same."""
    try:
        # Numbers that JSON has not are written in the words of transformers.
        entries = json.loads(text, parse_constant=lambda name: {"__float__": name})
        json.dumps(entries, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError) as error:
        raise _config_error(path, f"not valid JSON: {error}") from error
    if not isinstance(entries, dict) or is_nested_deeper(entries, MAX_CONFIG_DEPTH):
        raise _config_error(path, f"not an object nested at most {MAX_CONFIG_DEPTH} deep")
    return entries


def _config_error(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path}: {what}", hint="restore the file, or save the checkpoint again", file=str(path))
