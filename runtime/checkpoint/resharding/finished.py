"""Whether a folder already holds exactly what a reshard would write, so that it can be kept."""

from __future__ import annotations

import hashlib
import os
import stat
from typing import TYPE_CHECKING

from plans.errors import MigratorError
from runtime.checkpoint.copying.commit import convert_write_errors
from runtime.checkpoint.files.file_names import MANIFEST
from runtime.checkpoint.manifest import Manifest, read_manifest
from runtime.checkpoint.resharding.plan import find_block_size, plan_block_sharing

if TYPE_CHECKING:
    from pathlib import Path

    from runtime.checkpoint.copying.copy_plan import OutputFile
    from runtime.checkpoint.resharding.plan import ReshardPlan

__all__ = ["has_expected_files"]


def has_expected_files(plan: ReshardPlan, folder: Path) -> bool:
    """Return whether a folder holds what would be written; the bytes of tensors are not read.

    Args:
        plan: the planned reshard.
        folder: the folder to compare with it.

    Raises:
        DestinationError: the folder cannot be read.
    """
    with convert_write_errors(folder):
        paths = [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]
        files = {path.relative_to(folder).as_posix(): path for path in paths}
        if folder.is_symlink() or files.keys() != plan.file_names or not all(map(_is_regular_file, files.values())):
            return False
        plan = plan_block_sharing(plan, find_block_size(plan, folder))
        return _has_side_files(plan, folder) and all(
            _has_fixed_bytes(folder / file.name, file) for file in plan.output.files
        )


def _is_regular_file(path: Path) -> bool:
    return stat.S_ISREG(path.lstat().st_mode)


def _has_side_files(plan: ReshardPlan, folder: Path) -> bool:
    """Return whether the files without tensors are those that would be written."""
    return (
        all((folder / name).read_bytes() == text for name, text in plan.output.extra_files.items())
        and all(
            _digest_file(folder / name) == _digest_file(plan.checkpoint.folder / name)
            for name in plan.checkpoint.side_files.copied
        )
        and (plan.output.manifest is None or _has_equal_manifest(plan.output.manifest, folder))
    )


def _has_fixed_bytes(path: Path, file: OutputFile) -> bool:
    """Return whether a file with tensors has the planned size, header and padding."""
    with path.open("rb") as stream:
        is_fixed = all(
            os.pread(stream.fileno(), len(content), offset) == content for offset, content in file.fixed_bytes.items()
        )
        return is_fixed and os.fstat(stream.fileno()).st_size == file.size


def _has_equal_manifest(planned: Manifest, folder: Path) -> bool:
    """Return whether a folder's manifest is the planned one but for its digests."""
    try:
        manifest = read_manifest(folder)
    except MigratorError:  # It cannot be the planned one, which can be read.
        return False
    digests = {name: entry.digest for name, entry in manifest.tensors.items()} | dict(manifest.optimizer)
    if planned.tensors.keys() != manifest.tensors.keys() or planned.optimizer.keys() != manifest.optimizer.keys():
        return False
    return planned.with_digests(digests).to_bytes() == (folder / MANIFEST).read_bytes()


def _digest_file(path: Path) -> bytes:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()
