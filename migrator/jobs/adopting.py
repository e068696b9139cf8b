"""Whether a folder holds just what a reshard would write, every byte of it: such a one may be taken for the result."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from migrator.jobs.answers import StepContext
from migrator.jobs.files import is_regular_file, list_files
from plans.errors import MigratorError
from runtime.checkpoint.copying.commit import convert_write_errors
from runtime.checkpoint.copying.sharing import find_block_size, plan_block_sharing
from runtime.checkpoint.ranks.manifest import read_manifest
from runtime.checkpoint.record import MANIFEST, Manifest
from runtime.checkpoint.verifying.verify import verify

if TYPE_CHECKING:
    from runtime.checkpoint.copying.new_file import OutputFile
    from runtime.checkpoint.foreign.source import ExternalSettings
    from runtime.checkpoint.reshard import ReshardPlan

__all__ = ["can_reuse_destination", "has_expected_files"]


def can_reuse_destination(
    plan: ReshardPlan, external: ExternalSettings | None, folder: Path, max_memory: int, context: StepContext
) -> bool:
    """Return whether what lies at a destination is just what would be written, as where a run was killed after it.

    Args:
        plan: of what would be written.
        external: how to read its source, where that is made of another stack's rank files.
        folder: that it would be written to.
        max_memory: bytes that reading may allocate.
        context: told how far it is.
    """
    if not has_expected_files(plan, folder):
        return False
    context.notify(f"note: {folder} is there already, and is compared with {plan.checkpoint.folder}")
    return verify(
        plan.checkpoint.folder, folder, max_memory=max_memory, progress=context.progress, external=external
    ).ok


def has_expected_files(plan: ReshardPlan, folder: Path) -> bool:
    """Return whether a folder holds all that would be written but for the bytes of tensors, which are not read."""
    here = {path.relative_to(folder).as_posix(): path for path in list_files(folder)}
    if folder.is_symlink() or here.keys() != plan.file_names or not all(map(is_regular_file, here.values())):
        return False
    with convert_write_errors(folder):
        plan = plan_block_sharing(plan, find_block_size(plan, folder))
        return _has_side_files(plan, folder) and all(
            _has_fixed_bytes(folder / file.name, file) for file in plan.output.files
        )


def _has_side_files(plan: ReshardPlan, folder: Path) -> bool:
    """Return whether all files without tensors are there as they would be written."""
    return (
        all((folder / name).read_bytes() == text for name, text in plan.output.extra_files.items())
        and all(
            _digest_file(folder / name) == _digest_file(plan.checkpoint.folder / name)
            for name in plan.checkpoint.side_files.copied
        )
        and (plan.output.manifest is None or _has_equal_manifest(plan.output.manifest, folder))
    )


def _has_fixed_bytes(path: Path, file: OutputFile) -> bool:
    """Return whether a file with tensors has the size and all bytes that no tensor brings."""
    with path.open("rb") as stream:
        is_fixed = all(
            os.pread(stream.fileno(), len(content), offset) == content for offset, content in file.fixed_bytes.items()
        )
        return is_fixed and os.fstat(stream.fileno()).st_size == file.size


def _has_equal_manifest(planned: Manifest, folder: Path) -> bool:
    """Return whether a folder's manifest is the planned one, with digests of its own."""
    try:
        found = read_manifest(folder)
    except MigratorError:  # It cannot be the planned one, which can be read.
        return False
    digests = {name: entry.digest for name, entry in found.tensors.items()} | dict(found.optimizer)
    if planned.tensors.keys() != found.tensors.keys() or planned.optimizer.keys() != found.optimizer.keys():
        return False
    return planned.with_digests(digests).to_bytes() == (folder / MANIFEST).read_bytes()


def _digest_file(path: Path) -> bytes:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()
