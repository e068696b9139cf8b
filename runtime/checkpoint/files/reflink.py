"""Blocks shared between files (XFS, Btrfs and others): whether a disk can, and the call that does it."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import tempfile
from collections.abc import Iterable
from pathlib import Path

from runtime.checkpoint.files.reading import convert_read_errors, open_descriptor

__all__ = ["clone_range", "probe_block_size"]

_FICLONERANGE = 0x4020940D
_ARGUMENTS = struct.Struct("qQQQ")
_UNSUPPORTED_ERRORS = frozenset(
    (errno.EOPNOTSUPP, errno.ENOTTY, errno.ENOSYS, errno.EXDEV, errno.EINVAL, errno.ETXTBSY),
)
"""What the system says where two files cannot share blocks; anything else is an error.

Source: ioctl_ficlonerange(2)
"""


def probe_block_size(sources: Iterable[Path], folder: Path) -> int:
    """Return the bytes of a block that files in a folder can share with one of the sources at least, 0 if they cannot.

    A block of one file of each disk is shared with a file that has no name, and so leaves nothing behind.

    Args:
        sources: files that exist.
        folder: on the disk of the result.

    Raises:
        CheckpointError: a source cannot be read.
        OSError: the folder cannot be written.
    """
    block = os.statvfs(folder).f_bsize
    for source in _find_largest_files(sources):
        if source.stat().st_size >= block and _can_share_block(source, folder, block):
            return block
    return 0


def clone_range(source: int, offset: int, length: int, target: int, target_offset: int) -> bool:
    """Let a file share another's blocks, and return whether it could.

    Args:
        source: descriptor of the file that has them.
        offset: of the first block in the source.
        length: bytes of whole blocks.
        target: descriptor of the file that gets them, which reaches as far.
        target_offset: of the first block in the target.

    Raises:
        OSError: the disk fails, or is full.
    """
    try:
        fcntl.ioctl(target, _FICLONERANGE, _ARGUMENTS.pack(source, offset, length, target_offset))
    except OSError as error:
        if error.errno in _UNSUPPORTED_ERRORS:
            return False
        raise
    return True


def _find_largest_files(sources: Iterable[Path]) -> Iterable[Path]:
    """Return the largest file of each disk."""
    found: dict[int, Path] = {}
    for source in sources:
        with convert_read_errors(source):
            at = source.stat()
        if at.st_dev not in found or at.st_size > found[at.st_dev].stat().st_size:
            found[at.st_dev] = source
    return found.values()


def _can_share_block(source: Path, folder: Path, block: int) -> bool:
    with tempfile.TemporaryFile(dir=folder) as probe, open_descriptor(source) as descriptor:
        probe.truncate(block)
        return clone_range(descriptor, 0, block, probe.fileno(), 0)
