"""Which layout a checkpoint has, by the names of its files."""

from __future__ import annotations

from pathlib import Path

from runtime.checkpoint.content import Layout
from runtime.checkpoint.dcp.names import METADATA, find_shard_files
from runtime.checkpoint.files.file_names import INDEX, WEIGHTS
from runtime.checkpoint.files.reading import convert_read_errors
from runtime.checkpoint.record import MANIFEST

__all__ = ["detect_layout"]


def detect_layout(folder: Path) -> Layout:
    """Return how a checkpoint lies in a folder, by the names of its files; hub form where nothing says otherwise."""
    with convert_read_errors(folder):
        if folder.is_dir() and find_shard_files(folder):
            return "dcp"
    if (folder / MANIFEST).is_file():
        return "ranks"
    is_hub = any((folder / name).exists() for name in (WEIGHTS, INDEX))
    return "dcp" if (folder / METADATA).is_file() and not is_hub else "hf"
