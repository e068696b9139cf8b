"""Which folders `--overwrite` replaces: checkpoints, with nothing in them that is not accounted for."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath

from plans.errors import DestinationError
from plans.text import format_names
from runtime.checkpoint.files.file_names import CONFIG, INDEX, MANIFEST, METADATA, WEIGHTS

__all__ = ["check_replaceable"]

_SHARDS = "shard-*-model-*-of-*.safetensors"
_KNOWN_FILES = re.compile(
    r"model(-\d{5}-of-\d{5})?\.safetensors|rank-\d+-of-\d+\.safetensors|shard-\d+-model-\d+-of-\d+\.safetensors"
    r"|__\d+_\d+\.distcp|\.metadata|model\.safetensors\.index\.json|migrator\.json|\.migrator-partial(-\d+)?"
    r"|((generation_|preprocessor_|processor_|video_preprocessor_)?config|tokenizer(_config)?|vocab|added_tokens"
    r"|special_tokens_map|chat_template)\.json"
    r"|tokenizer\.model|merges\.txt|vocab\.txt|.*\.jinja|README\.md|LICENSE(\.\w+)?|\.gitattributes"
)
"""Names of files that checkpoints consist of, and of those that save_pretrained and the hub put beside them."""


def check_replaceable(folder: Path, names: Collection[str] | None = None) -> None:
    """Refuse to replace what is no checkpoint, or holds more than one.

    Args:
        folder: to replace; an empty one may always be.
        names: of the files of the result, which may replace theirs; None where they are not known yet.

    Raises:
        DestinationError: it may not be replaced.
    """
    if not _is_checkpoint(folder):
        raise DestinationError(
            f"{folder}: is no checkpoint, and nothing else is ever replaced",
            hint="name a new folder",
            path=str(folder),
        )
    others = [name for name in _list_files(folder) if names is not None and not _is_accounted_for(name, names)]
    if others:
        raise DestinationError(
            f"{folder}: holds {format_names(others)}, which would be lost",
            hint="move them away, or name a new folder",
            path=str(folder),
            files=others,
        )


def _is_checkpoint(folder: Path) -> bool:
    """Return whether a reader would take a folder for a checkpoint."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    if not any(folder.iterdir()):
        return True
    has_weights = any((folder / name).is_file() for name in (WEIGHTS, INDEX, MANIFEST, METADATA))
    return (folder / CONFIG).is_file() and (has_weights or any(folder.glob(_SHARDS)))


def _is_accounted_for(name: str, names: Collection[str]) -> bool:
    """Return whether a file is of a checkpoint, or of the same place in it as an optimizer's state of the result."""
    path = PurePosixPath(name)
    is_of_state = path.suffix == ".distcp" and str(path.with_name(METADATA)) in names
    return name in names or is_of_state or _KNOWN_FILES.fullmatch(name) is not None


def _list_files(folder: Path) -> Iterator[str]:
    """Yield everything in a folder but folders that hold something, `/` between the parts of a name."""
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not path.is_dir() or not any(path.iterdir()):
            yield path.relative_to(folder).as_posix()
