"""What checkpoints need of the operating system, and what happens where a call is missing.

All of these calls exist on Linux. Where one that only saves time or space is missing, as `posix_fadvise` is on macOS,
it is skipped or replaced. Where one that safety depends on is missing, as file locks are on Windows, the work is
refused before it begins.
"""

from __future__ import annotations

import errno
import os
import struct
import sys
from pathlib import Path

from plans.errors import UsageError

try:
    import fcntl
except ImportError:  # Windows has no such module
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "READ_ONLY",
    "READ_WRITE",
    "advise_on_write",
    "check_has_locks",
    "clone_range",
    "count_cpus",
    "drop_cached_pages",
    "get_block_size",
    "lock",
    "read_at",
    "resident_bytes",
    "sync_data",
    "write_at",
]

READ_ONLY = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
"""How to open a file that is read by offsets."""

READ_WRITE = os.O_RDWR | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOFOLLOW", 0)
"""How to open a file of the result, which is never a link."""

_FICLONERANGE = 0x4020940D
_CLONE_ARGUMENTS = struct.Struct("qQQQ")
_CANNOT_CLONE = frozenset(
    (errno.EOPNOTSUPP, errno.ENOTTY, errno.ENOSYS, errno.EXDEV, errno.EINVAL, errno.ETXTBSY),
)
"""The errors of a system on which two files cannot share blocks; any other error is a failure.

Source: ioctl_ficlonerange(2)
"""


_NO_SPACE = frozenset((errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC), errno.EFBIG))
_FORBIDDEN = frozenset((errno.EACCES, errno.EPERM, errno.EROFS))


def check_has_locks() -> None:
    """Raise UsageError on a system without file locks, before a lock file is created."""
    if fcntl is None:
        raise _missing_call_error("file locks (flock)")


def lock(descriptor: int) -> None:
    """Lock an open file for this process; the lock dies with it.

    Raises:
        BlockingIOError: another process holds the lock.
    """
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def read_at(descriptor: int, buffer: memoryview, offset: int) -> int:
    """Read from a file at an offset into a buffer, and return the number of bytes read, 0 at the file's end.

    Raises:
        OSError: the disk fails.
        UsageError: the system cannot read at offsets.
    """
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [buffer], offset)
    if not hasattr(os, "pread"):
        raise _missing_call_error("reads at an offset (pread)")
    content = os.pread(descriptor, len(buffer), offset)
    buffer[: len(content)] = content
    return len(content)


def write_at(descriptor: int, content: memoryview, offset: int) -> int:
    """Write to a file at an offset, and return the number of bytes written.

    Raises:
        OSError: the disk fails, or is full.
        UsageError: the system cannot write at offsets.
    """
    if not hasattr(os, "pwrite"):
        raise _missing_call_error("writes at an offset (pwrite)")
    return os.pwrite(descriptor, content, offset)


def advise_on_write(error: OSError) -> str:
    """Return the next step where the system cannot write a file, by what it says is wrong."""
    if error.errno in _NO_SPACE:
        return "free some space or choose another disk"
    if error.errno in _FORBIDDEN:
        return "choose a folder that you may write to"
    return "check the path and that the disk is well"


def sync_data(descriptor: int) -> None:
    """Sync a file's bytes to the disk, and where the system can, only the metadata needed to read them."""
    getattr(os, "fdatasync", os.fsync)(descriptor)


def drop_cached_pages(descriptor: int) -> None:
    """Let the page cache reuse the memory that a synced file takes, if the system can be told."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def count_cpus() -> int:
    """Return the number of processors that this process may use, or all of them where the system does not tell."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def resident_bytes() -> int:
    """Return the memory of this process in bytes, 0 where the system does not tell."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0


def get_block_size(folder: Path) -> int:
    """Return the block size in bytes of a folder's file system, 0 where files cannot share blocks on this system."""
    can_clone = fcntl is not None and sys.platform.startswith("linux")
    return os.statvfs(folder).f_bsize if can_clone else 0


def clone_range(source: int, offset: int, length: int, target: int, target_offset: int) -> bool:
    """Make one file share another file's blocks, and return whether the system can do that.

    Args:
        source: the descriptor of the file that has the blocks.
        offset: the offset of the first block in the source.
        length: the bytes of whole blocks to share.
        target: the descriptor of the file that shares them, which is long enough already.
        target_offset: the offset of the first block in the target.

    Raises:
        OSError: the disk fails, or is full.
    """
    try:
        fcntl.ioctl(target, _FICLONERANGE, _CLONE_ARGUMENTS.pack(source, offset, length, target_offset))
    except OSError as error:
        if error.errno in _CANNOT_CLONE:
            return False
        raise
    return True


def _missing_call_error(what: str) -> UsageError:
    return UsageError(
        f"this operating system has no {what}, which checkpoints cannot do without",
        hint="run this command on Linux or macOS",
        platform=sys.platform,
    )
