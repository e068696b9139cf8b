"""Whether a folder holds just what a reshard would write, every byte of it: such a one may be taken for the result."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from migrator.jobs.answers import Task
from migrator.jobs.files import files_below, is_regular
from plans.errors import MigratorError
from runtime.checkpoint.copying.commit import writing
from runtime.checkpoint.copying.sharing import block_for, sharing
from runtime.checkpoint.ranks.manifest import read_manifest
from runtime.checkpoint.record import MANIFEST, Manifest
from runtime.checkpoint.verifying.verify import verify

if TYPE_CHECKING:
    from runtime.checkpoint.copying.new_file import NewFile
    from runtime.checkpoint.foreign.source import Foreign
    from runtime.checkpoint.reshard import ReshardPlan

__all__ = ["is_result", "looks_like_result"]


def is_result(plan: ReshardPlan, foreign: Foreign | None, folder: Path, max_memory: int, task: Task) -> bool:
    """Return whether what lies at a destination is just what would be written, as where a run was killed after it.

    Args:
        plan: of what would be written.
        foreign: how to read its source, where that is made of another stack's rank files.
        folder: that it would be written to.
        max_memory: bytes that reading may allocate.
        task: told how far it is.
    """
    if not looks_like_result(plan, folder):
        return False
    task.say(f"note: {folder} is there already, and is compared with {plan.content.folder}")
    return verify(plan.content.folder, folder, max_memory=max_memory, progress=task.progress, foreign=foreign).ok


def looks_like_result(plan: ReshardPlan, folder: Path) -> bool:
    """Return whether a folder holds all that would be written but for the bytes of tensors, which are not read."""
    here = {path.relative_to(folder).as_posix(): path for path in files_below(folder)}
    if folder.is_symlink() or here.keys() != plan.names or not all(map(is_regular, here.values())):
        return False
    with writing(folder):
        plan = sharing(plan, block_for(plan, folder))
        return _has_beside(plan, folder) and all(_has_fixed(folder / file.name, file) for file in plan.laid.files)


def _has_beside(plan: ReshardPlan, folder: Path) -> bool:
    """Return whether all files without tensors are there as they would be written."""
    return (
        all((folder / name).read_bytes() == text for name, text in plan.laid.texts.items())
        and all(_digest(folder / name) == _digest(plan.content.folder / name) for name in plan.content.side.copied)
        and (plan.laid.manifest is None or _says_the_same(plan.laid.manifest, folder))
    )


def _has_fixed(path: Path, file: NewFile) -> bool:
    """Return whether a file with tensors has the size and all bytes that no tensor brings."""
    with path.open("rb") as stream:
        is_fixed = all(
            os.pread(stream.fileno(), len(content), offset) == content for offset, content in file.fixed.items()
        )
        return is_fixed and os.fstat(stream.fileno()).st_size == file.size


def _says_the_same(planned: Manifest, folder: Path) -> bool:
    """Return whether a folder's manifest is the planned one, with digests of its own."""
    try:
        found = read_manifest(folder)
    except MigratorError:  # It cannot be the planned one, which can be read.
        return False
    digests = {name: entry.digest for name, entry in found.tensors.items()} | dict(found.optimizer)
    if planned.tensors.keys() != found.tensors.keys() or planned.optimizer.keys() != found.optimizer.keys():
        return False
    return planned.with_digests(digests).to_bytes() == (folder / MANIFEST).read_bytes()


def _digest(path: Path) -> bytes:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()
