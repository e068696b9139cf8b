"""Small disks whose files can share blocks, mounted from images, and where on a disk a file's blocks lie."""

from __future__ import annotations

import fcntl
import os
import shutil
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

BLOCK = 4096
_FIEMAP = 0xC020660B
_SYNC = 1
_HEAD = struct.Struct("QQIIII")
_EXTENT = struct.Struct("QQQQQIIII")
_MAKE = {"xfs": ["mkfs.xfs", "-q", "-m", "reflink=1"], "btrfs": ["mkfs.btrfs", "-q"]}


@contextmanager
def mounted(kind: str, folder: Path) -> Iterator[Path]:
    """Give a new disk of 320 MiB, or skip the test and say why."""
    image, at = folder / f"{kind}.img", folder / kind
    with image.open("wb") as stream:
        stream.truncate(320 * 2**20)
    if shutil.which(_MAKE[kind][0]) is None:
        pytest.skip(f"{_MAKE[kind][0]} is not installed")
    subprocess.run([*_MAKE[kind], image], check=True, capture_output=True)
    at.mkdir()
    done = subprocess.run(["mount", "-o", "loop", image, at], check=False, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mounting {kind} is not allowed here: {done.stderr.strip()}")
    try:
        yield at
    finally:
        # Lazily: what a failed test still maps must not keep the disk here for good.
        subprocess.run(["umount", "--lazy", at], check=True)
        image.unlink()


def blocks(path: Path) -> set[int]:
    """Return where on the disk each block of a file lies, by what the file system itself says."""
    found: set[int] = set()
    with path.open("rb") as stream:
        size, start = os.fstat(stream.fileno()).st_size, 0
        while start < size:
            buffer = bytearray(_HEAD.pack(start, size - start, _SYNC, 0, 512, 0) + bytes(512 * _EXTENT.size))
            fcntl.ioctl(stream.fileno(), _FIEMAP, buffer)
            count = _HEAD.unpack_from(buffer)[3]
            for number in range(count):
                logical, physical, length, *_ = _EXTENT.unpack_from(buffer, _HEAD.size + number * _EXTENT.size)
                found |= {physical + step for step in range(0, length, BLOCK)}
                start = logical + length
            if not count:
                break
    return found


def shared(source: Path, result: Path) -> int:
    """Return how many bytes of the weight files of one folder lie in the same blocks as those of another."""
    theirs: set[int] = set()
    for path in source.glob("*.safetensors"):
        theirs |= blocks(path)
    return sum(BLOCK * len(blocks(path) & theirs) for path in result.glob("*.safetensors"))
