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
    "END",
    "END_64",
    "ENTRY",
    "EXTRA",
    "FOR_64",
    "IN_64",
    "LOCAL",
    "LOCATOR",
    "SIZE_64",
    "Member",
    "Region",
    "find_members",
]

END = struct.Struct("<4s4H2LH")
LOCATOR = struct.Struct("<4sLQL")
END_64 = struct.Struct("<4sQ2H2L4Q")
ENTRY = struct.Struct("<4s6H3L5H2L")
LOCAL = struct.Struct("<4s5H3L2H")
EXTRA = struct.Struct("<2H")
SIZE_64 = struct.Struct("<Q")
IN_64 = 0xFFFFFFFF
FOR_64 = 1
_MAX_DIRECTORY = 2**20


@dataclass(frozen=True, slots=True)
class Region:
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

    def part(self, offset: int, size: int) -> Region:
        """Return a region within this one.

        Raises:
            HeaderError: it would lie outside.
        """
        if not 0 <= offset <= offset + size <= self.size:
            raise self.error("is cut short or damaged")
        return Region(self.descriptor, self.file, self.start + offset, size)

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
class Member:
    """A member of an archive: where its own header begins in the archive, and its size in bytes."""

    header: int
    size: int

    def within(self, archive: Region) -> Region:
        """Return where the member's bytes lie.

        Raises:
            HeaderError: there is no member.
        """
        signature, *_, names, extra = LOCAL.unpack(archive.part(self.header, LOCAL.size).read())
        if signature != b"PK\x03\x04":
            raise archive.error("has a directory that leads to no member")
        return archive.part(self.header + LOCAL.size + names + extra, self.size)


def find_members(archive: Region) -> dict[str, Member]:
    """Return the members by name, without the folder that torch puts all of them in.

    Raises:
        HeaderError: there is no directory, it is damaged, or a member is compressed.
    """
    try:
        return _members(archive, _directory(archive).read())
    except (struct.error, UnicodeDecodeError) as error:
        raise archive.error("has a damaged directory") from error


def _directory(archive: Region) -> Region:
    end = archive.size - END.size
    signature, *_, size, offset, comment = END.unpack(archive.part(end, END.size).read())
    if signature != b"PK\x05\x06" or comment:
        raise archive.error("is no archive of torch.save")
    before = end - LOCATOR.size
    if before >= 0:
        signature, _, place, _ = LOCATOR.unpack(archive.part(before, LOCATOR.size).read())
        if signature == b"PK\x06\x07":
            *_, size, offset = END_64.unpack(archive.part(place, END_64.size).read())
    if size > _MAX_DIRECTORY:
        raise archive.error(f"has a directory of {size} bytes")
    return archive.part(offset, size)


def _members(archive: Region, directory: bytes) -> dict[str, Member]:
    members: dict[str, Member] = {}
    cursor = 0
    while cursor < len(directory):
        row = ENTRY.unpack_from(directory, cursor)
        signature, method, packed, size, names, extra, comment, header = row[0], row[4], *row[8:13], row[16]
        cursor += ENTRY.size
        name = directory[cursor : cursor + names].decode()
        more = directory[cursor + names : cursor + names + extra]
        cursor += names + extra + comment
        size, packed, header = _widened(more, (size, packed, header))
        if signature != b"PK\x01\x02" or method or packed != size or cursor > len(directory):
            raise archive.error("has a compressed or damaged member")
        members[name.partition("/")[2]] = Member(header, size)
    return members


def _widened(extra: bytes, numbers: tuple[int, int, int]) -> tuple[int, int, int]:
    """Return size, packed size and header offset, those that do not fit 32 bits taken from the extra field."""
    cursor = 0
    wide = b""
    while cursor + EXTRA.size <= len(extra):
        kind, length = EXTRA.unpack_from(extra, cursor)
        cursor += EXTRA.size
        if kind == FOR_64:
            wide = extra[cursor : cursor + length]
        cursor += length
    found: list[int] = []
    for number in numbers:
        if number == IN_64:
            (number,) = SIZE_64.unpack_from(wide)
            wide = wide[SIZE_64.size :]
        found.append(number)
    return found[0], found[1], found[2]
