"""The tensor in an archive of a `.distcp` file, which `torch.save` wrote: its bytes are located, never loaded.

`torch.load` would read the whole tensor into memory and, without `weights_only`, run code. Here `zipfile` reads the
directory of the archive, the pickle is read as data, and what is left is a range of bytes in a file.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from zipfile import ZIP_STORED, BadZipFile, ZipFile, ZipInfo

from plans.errors import HeaderError
from runtime.checkpoint.dcp.pickle import Global, PickledCall, read_pickle
from runtime.checkpoint.files.reading import is_size, read_exactly
from runtime.checkpoint.files.safetensors import BITS, StoredTensor
from runtime.models.dtypes import DTYPE_NAMES

__all__ = [
    "LOCAL_HEADER",
    "STORAGES",
    "TORCH_DTYPES",
    "ArchivedTensor",
    "BoundedFile",
    "read_archived_tensor",
    "read_data_pickle",
]

LOCAL_HEADER = struct.Struct("<4s5H3L2H")
"""The header before each member's bytes, which ends with the lengths of its name and of its extra field.

Source: PKWARE's APPNOTE.TXT, section 4.3.7.
"""

_MAX_READ = 2**20
"""The most bytes that `zipfile` may read at once, which bounds the directory and so the memory it takes."""

_MAX_MEMBER = 2**16


@dataclass(frozen=True, slots=True)
class BoundedFile:
    """A range of an open file: an archive, or a member of it. Nothing outside the range can be read through it.

    Args:
        descriptor: the open file.
        file: its path.
        start: the offset of the range in the file, in bytes.
        size: the size of the range in bytes.
    """

    descriptor: int
    file: Path
    start: int
    size: int

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
        return HeaderError(
            f"{self.file}: the tensor saved at byte {self.start} {what}",
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
        if size > _MAX_READ:
            raise self._archive.error(f"has a directory of {size} bytes")
        content = self._archive.slice(min(self._position, self._archive.size), size).read()
        self._position += size
        return content


def _find_members(archive: BoundedFile) -> dict[str, ZipInfo]:
    """Return the members by name, without the folder that torch puts all of them in.

    Raises:
        HeaderError: the directory is missing or damaged, or a member is compressed.
    """
    try:
        with ZipFile(_Stream(archive)) as opened:
            members = opened.infolist()
    except (BadZipFile, NotImplementedError, ValueError, OSError, struct.error) as error:
        raise archive.error("is not a zip archive, or its directory is damaged") from error
    if any(member.compress_type != ZIP_STORED or member.compress_size != member.file_size for member in members):
        raise archive.error("has a compressed or damaged member")
    return {member.filename.partition("/")[2]: member for member in members}


def _locate_member(archive: BoundedFile, member: ZipInfo) -> BoundedFile:
    """Return where a member's bytes are; `ZipFile` would read them, and check a checksum that torch may omit.

    Raises:
        HeaderError: there is no member where the directory says.
    """
    signature, *_, name, extra = LOCAL_HEADER.unpack(archive.slice(member.header_offset, LOCAL_HEADER.size).read())
    if signature != b"PK\x03\x04":
        raise archive.error("has a directory that leads to no member")
    return archive.slice(member.header_offset + LOCAL_HEADER.size + name + extra, member.file_size)


TORCH_DTYPES: Mapping[str, str] = {str(dtype): name for dtype, name in DTYPE_NAMES.items()}
"""The safetensors name of a dtype by its torch name, such as `torch.float32`."""

STORAGES: Mapping[str, str] = {
    "torch.DoubleStorage": "F64", "torch.FloatStorage": "F32", "torch.HalfStorage": "F16",
    "torch.BFloat16Storage": "BF16", "torch.LongStorage": "I64", "torch.IntStorage": "I32",
    "torch.ShortStorage": "I16", "torch.CharStorage": "I8", "torch.ByteStorage": "U8",
    "torch.BoolStorage": "BOOL", "torch.ComplexFloatStorage": "C64",
}  # fmt: skip
"""The safetensors name of a storage type's dtype; other dtypes are given next to an untyped storage."""

_UNTYPED = "torch.storage.UntypedStorage"
_REBUILD_FUNCTIONS = tuple(f"torch._utils._rebuild_tensor_{version}" for version in ("v2", "v3"))
_ALLOWED = frozenset((*TORCH_DTYPES, *STORAGES, _UNTYPED, *_REBUILD_FUNCTIONS, "collections.OrderedDict"))


@dataclass(frozen=True, slots=True)
class ArchivedTensor:
    """A tensor as an archive stores it.

    Args:
        storage: its elements as a one-dimensional stored tensor.
        shape: the tensor's shape.
        base: the index of its first element in the storage.
        strides: the storage elements per step along each dim, which need not be row-major.
    """

    storage: StoredTensor
    shape: tuple[int, ...]
    base: int
    strides: tuple[int, ...]


def read_archived_tensor(archive: BoundedFile) -> ArchivedTensor:
    """Read the description of the one tensor in an archive.

    Raises:
        HeaderError: the archive is not what `torch.save` writes for a plain tensor.
    """
    members = _find_members(archive)
    if "byteorder" in members and _read_member(archive, members["byteorder"]) != b"little":
        raise archive.error("has its bytes in big-endian order")
    location = f"{archive.file}, the tensor saved at byte {archive.start}"
    view = _parse_view(read_pickle(_read_pickle_member(archive, members), _ALLOWED, location))
    if view is None or f"data/{view.storage}" not in members:
        raise archive.error("is not a plain tensor")
    storage = _locate_member(archive, members[f"data/{view.storage}"])
    count, rest = divmod(storage.size * 8, BITS[view.dtype])
    if rest or not _is_within_storage(view, count):
        raise archive.error("does not lie within its storage")
    stored = StoredTensor(archive.file, view.dtype, (count,), storage.start, storage.size)
    return ArchivedTensor(stored, view.shape, view.base, view.strides)


def read_data_pickle(archive: BoundedFile) -> bytes:
    """Return the pickle in an archive, which describes everything but the storages.

    Raises:
        HeaderError: the archive is not what `torch.save` writes.
    """
    return _read_pickle_member(archive, _find_members(archive))


def _read_pickle_member(archive: BoundedFile, members: Mapping[str, ZipInfo]) -> bytes:
    if "data.pkl" not in members:
        raise archive.error("is not an archive of torch.save")
    return _read_member(archive, members["data.pkl"])


def _read_member(archive: BoundedFile, member: ZipInfo) -> bytes:
    if member.file_size > _MAX_MEMBER:
        raise archive.error(f"has a description of {member.file_size} bytes")
    return _locate_member(archive, member).read()


@dataclass(frozen=True, slots=True)
class _View:
    storage: str
    dtype: str
    base: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _parse_view(value: object) -> _View | None:
    """Return the view that a pickled tensor is of a storage, or None if the value is anything else."""
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
        ) if len(shape) == len(strides) and all(map(is_size, (base, *shape, *strides))):
            dtype = _resolve_dtype(kind, storage, more)
            return _View(key, dtype, base, shape, strides) if dtype else None
    return None


def _resolve_dtype(kind: str, storage: str, more: Sequence[object]) -> str | None:
    """Return the dtype of a storage's type, or the one given next to an untyped storage."""
    match kind, more:
        case "torch._utils._rebuild_tensor_v2", []:
            return STORAGES.get(storage)
        case "torch._utils._rebuild_tensor_v3", [Global(dtype)] if storage == _UNTYPED:
            return TORCH_DTYPES.get(dtype)
    return None


def _is_within_storage(view: _View, count: int) -> bool:
    """Return whether a view's elements lie in a storage of so many elements, none of them twice."""
    elements = prod(view.shape)
    if not 0 < elements <= count:
        return not elements
    last = sum((size - 1) * stride for size, stride in zip(view.shape, view.strides, strict=True))
    return view.base + last < count
