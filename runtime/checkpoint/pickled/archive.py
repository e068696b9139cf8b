"""Archives as `torch.save` writes them since torch 1.6: where their members lie, without loading any of them.

`torch.load` would read whole tensors into memory and, without `weights_only`, run code. Here `zipfile` reads the
directory of an archive, and what is left are ranges of bytes in a file. Nothing about the ranges is believed: none may
reach out of the archive or overlap another, and no two members may have one name.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from zipfile import ZIP_STORED, BadZipFile, ZipFile, ZipInfo

from plans.errors import HeaderError
from runtime.checkpoint.files.reading import read_exactly

__all__ = ["LOCAL_HEADER", "Archive", "BoundedFile", "read_archive"]

LOCAL_HEADER = struct.Struct("<4s5H3L2H")
"""The header before each member's bytes, which ends with the lengths of its name and of its extra field.

Source: PKWARE's APPNOTE.TXT, section 4.3.7.
"""

_MAX_DIRECTORY = 2**20
_MAX_DESCRIPTION = 2**16
_MAX_WHOLE_DIRECTORY = 2**23
_MAX_WHOLE_DESCRIPTION = 2**25
"""How many bytes the directory and the pickle may have, in an archive of one tensor and in one that is a whole file."""

_IS_ENCRYPTED = 1
_IS_UTF_8 = 0x800


@dataclass(frozen=True, slots=True)
class BoundedFile:
    """A range of an open file: an archive, or a member of it. Nothing outside the range can be read through it.

    Args:
        descriptor: the open file.
        file: its path.
        start: the offset of the range in the file, in bytes.
        size: the size of the range in bytes.
        is_whole: whether the archive is a whole file, and not the part of one that stores a single tensor.
    """

    descriptor: int
    file: Path
    start: int
    size: int
    is_whole: bool = False

    def slice(self, offset: int, size: int) -> BoundedFile:
        """Return a range within this one.

        Raises:
            HeaderError: it would reach outside.
        """
        if not 0 <= offset <= offset + size <= self.size:
            raise self.error("is cut short or damaged")
        return BoundedFile(self.descriptor, self.file, self.start + offset, size)

    def read(self) -> bytes:
        """Return the bytes of the range."""
        content = bytearray(self.size)
        read_exactly(self.descriptor, memoryview(content), self.start, self.file)
        return bytes(content)

    def error(self, what: str) -> HeaderError:
        """Return the error for an archive that is not what torch writes."""
        subject = "the archive" if self.is_whole else f"the tensor saved at byte {self.start}"
        return HeaderError(
            f"{self.file}: {subject} {what}",
            hint="copy or save the file again",
            file=str(self.file),
            offset=self.start,
        )


class _Stream:
    """An archive as the file object that `zipfile` reads, a little at a time."""

    def __init__(self, archive: BoundedFile) -> None:
        self._archive, self._position = archive, 0

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._archive.size}[whence]
        if position < 0:
            raise OSError("seek before the beginning")
        self._position = position
        return position

    def tell(self) -> int:
        return self._position

    def read(self, size: int = -1, /) -> bytes:
        rest = max(0, self._archive.size - self._position)
        size = rest if size < 0 else min(size, rest)
        if size > (_MAX_WHOLE_DIRECTORY if self._archive.is_whole else _MAX_DIRECTORY):
            raise self._archive.error(f"has a directory of {size} bytes")
        content = self._archive.slice(min(self._position, self._archive.size), size).read()
        self._position += size
        return content


@dataclass(frozen=True)
class Archive:
    """An archive whose directory has been read.

    Args:
        file: where it is.
        members: its members by name, without the folder that torch puts all of them in.
        ends: where the next member or the directory begins, by the same names.
    """

    file: BoundedFile
    members: Mapping[str, ZipInfo] = field(repr=False)
    ends: Mapping[str, int] = field(repr=False)

    @property
    def label(self) -> str:
        """What to call it in error messages."""
        return (
            str(self.file.file)
            if self.file.is_whole
            else f"{self.file.file}, the tensor saved at byte {self.file.start}"
        )

    def locate(self, name: str) -> BoundedFile:
        """Return where a member's bytes are; `ZipFile` would read them, and check a checksum that torch may omit.

        Raises:
            HeaderError: there is no member where the directory says, or it has another name, or overlaps the next one.
        """
        member, archive = self.members[name], self.file
        fixed = archive.slice(member.header_offset, LOCAL_HEADER.size).read()
        signature, *_, name_size, extra_size = LOCAL_HEADER.unpack(fixed)
        if signature != b"PK\x03\x04":
            raise archive.error("has a directory that leads to no member")
        start = member.header_offset + LOCAL_HEADER.size
        encoding = "utf-8" if member.flag_bits & _IS_UTF_8 else "cp437"
        if archive.slice(start, name_size).read() != member.orig_filename.encode(encoding):
            raise archive.error(f"has a member with another name than {name!r}, which the directory lists")
        start += name_size + extra_size
        if start + member.file_size > self.ends[name]:
            raise archive.error(f"has a member {name!r} that overlaps what follows it")
        return archive.slice(start, member.file_size)

    def read(self, name: str) -> bytes:
        """Return the bytes of a small member.

        Raises:
            HeaderError: it is not small, or not where the directory says.
        """
        limit = _MAX_WHOLE_DESCRIPTION if self.file.is_whole else _MAX_DESCRIPTION
        if (size := self.members[name].file_size) > limit:
            raise self.file.error(f"has a description of {size} bytes")
        return self.locate(name).read()

    def read_description(self) -> bytes:
        """Return the pickle that describes everything but the storages.

        Raises:
            HeaderError: the archive is not what `torch.save` writes.
        """
        if "data.pkl" not in self.members:
            raise self.file.error("is not an archive of torch.save")
        if "constants.pkl" in self.members:
            raise self.file.error("is of torch.jit.save, which stores a program and not only tensors")
        if "byteorder" in self.members and self.read("byteorder") != b"little":
            raise self.file.error("has its bytes in big-endian order")
        return self.read("data.pkl")


def read_archive(file: BoundedFile) -> Archive:
    """Read the directory of an archive.

    Raises:
        HeaderError: the directory is missing or damaged, names a member twice, lets members overlap, or a member is
            compressed or encrypted.
    """
    try:
        with ZipFile(_Stream(file)) as opened:
            members, directory = opened.infolist(), opened.start_dir
    except (BadZipFile, NotImplementedError, ValueError, OSError, struct.error) as error:
        raise file.error("is not a zip archive, or its directory is damaged") from error
    if any(member.compress_type != ZIP_STORED or member.compress_size != member.file_size for member in members):
        raise file.error("has a compressed or damaged member")
    if any(member.flag_bits & _IS_ENCRYPTED for member in members):
        raise file.error("has an encrypted member")
    by_name = {member.filename.partition("/")[2]: member for member in members}
    if len(by_name) < len(members):
        raise file.error("has two members of the same name")
    ordered = sorted(by_name, key=lambda name: by_name[name].header_offset)
    starts = [*(by_name[name].header_offset for name in ordered), directory]
    ends = dict(zip(ordered, starts[1:], strict=True))
    for name, (start, end) in zip(ordered, pairwise(starts), strict=True):
        if start < 0 or start + LOCAL_HEADER.size + by_name[name].file_size > end:
            raise file.error(f"has a member {name!r} that overlaps what follows it")
    return Archive(file, by_name, ends)
