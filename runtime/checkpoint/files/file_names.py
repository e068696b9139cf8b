"""Names of files: those of hub form and of a journal, what weight files may be called, and that none are alike."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from plans.errors import CheckpointError
from plans.text import format_names

__all__ = ["INDEX", "MARKER", "WEIGHTS", "check_distinct_names", "is_weight_file"]

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

MARKER = ".migrator-partial"
"""The journal of a folder that is being written, by which a later run knows what was left there."""

_MAX_BYTES = 255
_OTHER_LAYOUTS = re.compile(r"rank-\d+-of-\d+\.safetensors|shard-\d+-model-\d+-of-\d+\.safetensors")


def is_weight_file(name: object) -> bool:
    """Return whether this is the plain name of a safetensors file, of no other layout's, that any disk can have."""
    return (
        isinstance(name, str)
        and name.endswith(".safetensors")
        and Path(name).name == name
        and "\\" not in name
        and name.isprintable()
        and len(name.encode(errors="replace")) <= _MAX_BYTES
        and _OTHER_LAYOUTS.fullmatch(name) is None
    )


def check_distinct_names(folder: Path, names: Iterable[str]) -> None:
    """Refuse a result in which two files would have one name, or one the name of another's folder.

    Args:
        folder: of the source.
        names: of all files of the result, `/` between their parts.

    Raises:
        CheckpointError: two of them are in each other's way.
    """
    counts = Counter(names)
    folders = {str(parent) for name in counts for parent in PurePosixPath(name).parents}
    twice = sorted(name for name, count in counts.items() if count > 1 or name in folders)
    if twice:
        raise CheckpointError(
            f"{folder}: the result would have two of {format_names(twice)}",
            hint="rename or move away the source's files of these names",
            files=twice,
        )
