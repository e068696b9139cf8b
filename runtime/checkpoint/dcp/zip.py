"""Where the members of a zip archive lie that `torch.save` wrote into the middle of a file; nothing is unpacked.

Source: PKWARE's APPNOTE.TXT, sections 4.3.7 to 4.3.16; torch writes every member uncompressed.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

from plans.errors import HeaderError
from runtime.checkpoint.files.reading import read_exactly

__all__ = [
    "DIRECTORY_ENTRY",
    "END_RECORD",
    "EXTRA_HEADER",
    "LOCAL_HEADER",
    "ZIP64_END_RECORD",
    "ZIP64_EXTRA_ID",
    "ZIP64_LOCATOR",
    "ZIP64_MARKER",
    "ZIP64_SIZE",
    "BoundedFile",
    "ZipMember",
    "find_members",
]

END_RECORD = struct.Struct("<4s4H2LH")
ZIP64_LOCATOR = struct.Struct("<4sLQL")
ZIP64_END_RECORD = struct.Struct("<4sQ2H2L4Q")
DIRECTORY_ENTRY = struct.Struct("<4s6H3L5H2L")
LOCAL_HEADER = struct.Struct("<4s5H3L2H")
EXTRA_HEADER = struct.Struct("<2H")
ZIP64_SIZE = struct.Struct("<Q")
ZIP64_MARKER = 0xFFFFFFFF
ZIP64_EXTRA_ID = 1
_MAX_DIRECTORY = 2**20


@dataclass(frozen=True, slots=True)
class BoundedFile:
    """A part of an open file: the archive, or a member of it.

    Args:
        descriptor: of the open file.
        file: its path.
        start: of the region in the file, in bytes.
        size: in bytes.
    """

    descriptor: int
    file: Path
    start: int
    size: int

    def slice(self, offset: int, size: int) -> BoundedFile:
        """Return a region within this one.

        Raises:
            HeaderError: it would lie outside.
        """
        if not 0 <= offset <= offset + size <= self.size:
            raise self.error("is cut short or damaged")
        return BoundedFile(self.descriptor, self.file, self.start + offset, size)

    def read(self) -> bytes:
        """Return the region's bytes."""
        content = bytearray(self.size)
        read_exactly(self.descriptor, memoryview(content), self.start, self.file)
        return bytes(content)

    def error(self, what: str) -> HeaderError:
        """Return the error of an archive that is not what torch writes."""
        return HeaderError(
            f"{self.file}: the tensor saved at byte {self.start} {what}",
            hint="copy or save the file again",
            file=str(self.file),
            offset=self.start,
        )


@dataclass(frozen=True, slots=True)
class ZipMember:
    """A member of an archive: where its own header begins in the archive, and its size in bytes."""

    header: int
    size: int

    def locate(self, archive: BoundedFile) -> BoundedFile:
        """Return where the member's bytes lie.

        Raises:
            HeaderError: there is no member.
        """
        signature, *_, names, extra = LOCAL_HEADER.unpack(archive.slice(self.header, LOCAL_HEADER.size).read())
        if signature != b"PK\x03\x04":
            raise archive.error("has a directory that leads to no member")
        return archive.slice(self.header + LOCAL_HEADER.size + names + extra, self.size)


def find_members(archive: BoundedFile) -> dict[str, ZipMember]:
    """Return the members by name, without the folder that torch puts all of them in.

    Raises:
        HeaderError: there is no directory, it is damaged, or a member is compressed.
    """
    try:
        return _parse_directory(archive, _find_directory(archive).read())
    except (struct.error, UnicodeDecodeError) as error:
        raise archive.error("has a damaged directory") from error


def _find_directory(archive: BoundedFile) -> BoundedFile:
    end = archive.size - END_RECORD.size
    signature, *_, size, offset, comment = END_RECORD.unpack(archive.slice(end, END_RECORD.size).read())
    if signature != b"PK\x05\x06" or comment:
        raise archive.error("is no archive of torch.save")
    before = end - ZIP64_LOCATOR.size
    if before >= 0:
        signature, _, place, _ = ZIP64_LOCATOR.unpack(archive.slice(before, ZIP64_LOCATOR.size).read())
        if signature == b"PK\x06\x07":
            *_, size, offset = ZIP64_END_RECORD.unpack(archive.slice(place, ZIP64_END_RECORD.size).read())
    if size > _MAX_DIRECTORY:
        raise archive.error(f"has a directory of {size} bytes")
    return archive.slice(offset, size)


def _parse_directory(archive: BoundedFile, directory: bytes) -> dict[str, ZipMember]:
    members: dict[str, ZipMember] = {}
    cursor = 0
    while cursor < len(directory):
        row = DIRECTORY_ENTRY.unpack_from(directory, cursor)
        signature, method, packed, size, names, extra, comment, header = row[0], row[4], *row[8:13], row[16]
        cursor += DIRECTORY_ENTRY.size
        name = directory[cursor : cursor + names].decode()
        more = directory[cursor + names : cursor + names + extra]
        cursor += names + extra + comment
        size, packed, header = _apply_zip64_sizes(more, (size, packed, header))
        if signature != b"PK\x01\x02" or method or packed != size or cursor > len(directory):
            raise archive.error("has a compressed or damaged member")
        members[name.partition("/")[2]] = ZipMember(header, size)
    return members


def _apply_zip64_sizes(extra: bytes, numbers: tuple[int, int, int]) -> tuple[int, int, int]:
    """Return size, packed size and header offset, those that do not fit 32 bits taken from the extra field."""
    cursor = 0
    wide = b""
    while cursor + EXTRA_HEADER.size <= len(extra):
        kind, length = EXTRA_HEADER.unpack_from(extra, cursor)
        cursor += EXTRA_HEADER.size
        if kind == ZIP64_EXTRA_ID:
            wide = extra[cursor : cursor + length]
        cursor += length
    found: list[int] = []
    for number in numbers:
        if number == ZIP64_MARKER:
            (number,) = ZIP64_SIZE.unpack_from(wide)
            wide = wide[ZIP64_SIZE.size :]
        found.append(number)
    return found[0], found[1], found[2]
