"""A tensor inside a `.distcp` file, an archive that `torch.save` wrote: its storage is found, never loaded."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from plans.errors import HeaderError
from runtime.checkpoint.dcp.pickle import Global, PickledCall, read_pickle
from runtime.checkpoint.files.reading import read_exactly
from runtime.checkpoint.files.safetensors import BITS, StoredTensor
from runtime.models.dtypes import DTYPE_NAMES

__all__ = [
    "DIRECTORY_ENTRY",
    "END_RECORD",
    "EXTRA_HEADER",
    "LOCAL_HEADER",
    "STORAGES",
    "TORCH_DTYPES",
    "ZIP64_END_RECORD",
    "ZIP64_EXTRA_ID",
    "ZIP64_LOCATOR",
    "ZIP64_MARKER",
    "ZIP64_SIZE",
    "ArchivedTensor",
    "BoundedFile",
    "ZipMember",
    "find_members",
    "read_archived_tensor",
    "read_data_pickle",
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


TORCH_DTYPES: Mapping[str, str] = {str(dtype): name for dtype, name in DTYPE_NAMES.items()}
"""safetensors' name of a dtype by torch's, `torch.float32`."""

STORAGES: Mapping[str, str] = {
    "torch.DoubleStorage": "F64", "torch.FloatStorage": "F32", "torch.HalfStorage": "F16",
    "torch.BFloat16Storage": "BF16", "torch.LongStorage": "I64", "torch.IntStorage": "I32",
    "torch.ShortStorage": "I16", "torch.CharStorage": "I8", "torch.ByteStorage": "U8",
    "torch.BoolStorage": "BOOL", "torch.ComplexFloatStorage": "C64",
}  # fmt: skip
"""safetensors' name of the dtype that a storage's type says; other dtypes are said beside an untyped storage."""

_UNTYPED = "torch.storage.UntypedStorage"
_REBUILD_FUNCTIONS = tuple(f"torch._utils._rebuild_tensor_{version}" for version in ("v2", "v3"))
_ALLOWED = frozenset((*TORCH_DTYPES, *STORAGES, _UNTYPED, *_REBUILD_FUNCTIONS, "collections.OrderedDict"))
_MAX_MEMBER = 2**16


@dataclass(frozen=True, slots=True)
class ArchivedTensor:
    """A tensor as an archive stores it.

    Args:
        storage: its elements, as many as there are, in one dim.
        shape: of the tensor.
        base: its first element in the storage.
        strides: storage elements per step along each dim; they need not be row-major.
    """

    storage: StoredTensor
    shape: tuple[int, ...]
    base: int
    strides: tuple[int, ...]


def read_archived_tensor(archive: BoundedFile) -> ArchivedTensor:
    """Read what an archive says of its one tensor.

    Raises:
        HeaderError: it is not what `torch.save` writes for a plain tensor.
    """
    members = find_members(archive)
    if "byteorder" in members and _read_member(archive, members["byteorder"]) != b"little":
        raise archive.error("has its bytes in big-endian order")
    where = f"{archive.file}, the tensor saved at byte {archive.start}"
    view = _parse_view(read_pickle(_read_pickle_member(archive, members), _ALLOWED, where))
    if view is None or f"data/{view.storage}" not in members:
        raise archive.error("is not a plain tensor")
    storage = members[f"data/{view.storage}"].locate(archive)
    count, rest = divmod(storage.size * 8, BITS[view.dtype])
    if rest or not _is_within_storage(view, count):
        raise archive.error("does not lie within its storage")
    stored = StoredTensor(archive.file, view.dtype, (count,), storage.start, storage.size)
    return ArchivedTensor(stored, view.shape, view.base, view.strides)


def read_data_pickle(archive: BoundedFile) -> bytes:
    """Return the pickle of what an archive holds, storages aside.

    Raises:
        HeaderError: it is not what `torch.save` writes.
    """
    return _read_pickle_member(archive, find_members(archive))


def _read_pickle_member(archive: BoundedFile, members: Mapping[str, ZipMember]) -> bytes:
    if "data.pkl" not in members:
        raise archive.error("is no archive of torch.save")
    return _read_member(archive, members["data.pkl"])


def _read_member(archive: BoundedFile, member: ZipMember) -> bytes:
    if member.size > _MAX_MEMBER:
        raise archive.error(f"has a description of {member.size} bytes")
    return member.locate(archive).read()


@dataclass(frozen=True, slots=True)
class _View:
    storage: str
    dtype: str
    base: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _parse_view(value: object) -> _View | None:
    """Return the view of a storage that a pickled tensor is, None where it is anything else."""
    match value:
        case PickledCall(
            kind,
            (
                PickledCall("persistent", ("storage", Global(storage), str(key), *_)),
                int(base),
                tuple(shape),
                tuple(strides),
                bool(),
                PickledCall("collections.OrderedDict", ()),
                *more,
            ),
        ) if len(shape) == len(strides) and _has_valid_sizes((base, *shape, *strides)):
            dtype = _resolve_dtype(kind, storage, more)
            return _View(key, dtype, base, shape, strides) if dtype else None
    return None


def _resolve_dtype(kind: str, storage: str, more: Sequence[object]) -> str | None:
    """Return the dtype that a storage's type says, or, where it has none, the one given beside it."""
    match kind, more:
        case "torch._utils._rebuild_tensor_v2", []:
            return STORAGES.get(storage)
        case "torch._utils._rebuild_tensor_v3", [Global(dtype)] if storage == _UNTYPED:
            return TORCH_DTYPES.get(dtype)
    return None


def _has_valid_sizes(numbers: Sequence[object]) -> bool:
    return all(type(number) is int and 0 <= number < 2**63 for number in numbers)


def _is_within_storage(view: _View, count: int) -> bool:
    """Return whether a view has its elements in a storage of so many, none of them twice."""
    elements = prod(view.shape)
    if not 0 < elements <= count:
        return not elements
    last = sum((size - 1) * stride for size, stride in zip(view.shape, view.strides, strict=True))
    return view.base + last < count
