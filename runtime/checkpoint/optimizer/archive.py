"""Archives as `torch.save` writes them, but without the tensor's bytes, which are copied into their place later.

`torch.save` itself would need the whole tensor in memory.

A tensor's checksum is left zero, because its bytes are not known yet. torch does not check it, and its own
`torch.serialization.set_crc32_options` omits it too. The digest in the manifest protects the bytes instead.

Source: PKWARE's APPNOTE.TXT, sections 4.3.7 to 4.3.16 and 4.5.3; `torch.serialization` of torch 2.13.
"""

from __future__ import annotations

import io
import pickle
import struct
import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from runtime.checkpoint.files.safetensors import tensor_bytes
from runtime.checkpoint.pickled.archive import LOCAL_HEADER
from runtime.checkpoint.pickled.tensors import STORAGES
from runtime.models.dtypes import DTYPES
from runtime.tensor_map.tensor_map import row_major

__all__ = ["ALIGNMENT", "TensorArchive", "build_tensor_archive", "build_value_archive"]

ALIGNMENT = 64
"""The alignment of a tensor in its archive, in bytes, as in torch."""

_END_RECORD = struct.Struct("<4s4H2LH")
_ZIP64_LOCATOR = struct.Struct("<4sLQL")
_ZIP64_END_RECORD = struct.Struct("<4sQ2H2L4Q")
_DIRECTORY_ENTRY = struct.Struct("<4s6H3L5H2L")
_EXTRA_HEADER = struct.Struct("<2H")
_ZIP64_SIZE = struct.Struct("<Q")
_ZIP64_MARKER = 0xFFFFFFFF
_ZIP64_EXTRA_ID = 1

_FORMAT_MEMBERS: Mapping[str, bytes] = {"byteorder": b"little", "version": b"3\n"}
_VERSION, _VERSION_64 = 20, 45
_PADDING = 0x4246
_TYPES = {name: getattr(torch, kind.removeprefix("torch.")) for kind, name in STORAGES.items()}


@dataclass(frozen=True, slots=True)
class TensorArchive:
    """An archive around the bytes of one tensor.

    Args:
        head: the bytes before the tensor.
        size: the size of the tensor in bytes.
        tail: the bytes after the tensor.
    """

    head: bytes
    size: int
    tail: bytes

    @property
    def length(self) -> int:
        """The size of the whole archive in bytes."""
        return len(self.head) + self.size + len(self.tail)


def build_tensor_archive(dtype: str, shape: Sequence[int]) -> TensorArchive:
    """Return the archive of a tensor in row-major order.

    Args:
        dtype: a dtype that torch has, by its name in safetensors.
        shape: the tensor's shape.
    """
    head, members = _write_members({"data.pkl": _pickle_tensor(dtype, shape), **_FORMAT_MEMBERS})
    storage = _Member("data/0", 0, tensor_bytes(dtype, shape), len(head))
    head += storage.local_header(aligned=True)
    return TensorArchive(head, storage.size, _write_directory([*members, storage], len(head) + storage.size))


def build_value_archive(pickled: bytes) -> bytes:
    """Return the archive of a value that is not a tensor, given its pickle."""
    head, members = _write_members({"data.pkl": pickled, **_FORMAT_MEMBERS})
    return head + _write_directory(members, len(head))


class _Member(NamedTuple):
    """A member of an archive: its name, checksum and size, and where its header begins."""

    name: str
    checksum: int
    size: int
    start: int

    @property
    def path(self) -> bytes:
        """The member's path in the archive; torch puts all members in one folder."""
        return f"archive/{self.name}".encode()

    def local_header(self, *, aligned: bool = False) -> bytes:
        """Return the header before the member's bytes, padded to align them if asked to."""
        extra = _pack_extra_64(self.size, self.size) if self.size >= _ZIP64_MARKER else b""
        if aligned:
            gap = -(self.start + LOCAL_HEADER.size + len(self.path) + len(extra) + _EXTRA_HEADER.size) % ALIGNMENT
            extra += _EXTRA_HEADER.pack(_PADDING, gap) + b"Z" * gap
        sizes = min(self.size, _ZIP64_MARKER), min(self.size, _ZIP64_MARKER)
        version = _VERSION_64 if self.size >= _ZIP64_MARKER else _VERSION
        fixed = LOCAL_HEADER.pack(b"PK\x03\x04", version, 0, 0, 0, 0, self.checksum, *sizes, len(self.path), len(extra))
        return fixed + self.path + extra

    def directory_entry(self) -> bytes:
        """Return the member's entry in the directory; its header must begin below 4 GiB."""
        extra = _pack_extra_64(self.size, self.size) if self.size >= _ZIP64_MARKER else b""
        sizes = min(self.size, _ZIP64_MARKER), min(self.size, _ZIP64_MARKER)
        version = _VERSION_64 if extra else _VERSION
        lengths = len(self.path), len(extra), 0
        fixed = _DIRECTORY_ENTRY.pack(
            b"PK\x01\x02", version, version, 0, 0, 0, 0, self.checksum, *sizes, *lengths, 0, 0, 0, self.start
        )
        return fixed + self.path + extra


def _write_members(members: Mapping[str, bytes]) -> tuple[bytes, list[_Member]]:
    """Return the beginning of an archive with these members, and the members."""
    content, written = b"", list[_Member]()
    for name, text in members.items():
        written.append(_Member(name, zlib.crc32(text), len(text), len(content)))
        content += written[-1].local_header() + text
    return content, written


def _write_directory(members: Sequence[_Member], start: int) -> bytes:
    """Return the end of an archive: its directory, and the records that locate it."""
    entries = b"".join(member.directory_entry() for member in members)
    count, size = len(members), len(entries)
    end = _END_RECORD.pack(b"PK\x05\x06", 0, 0, count, count, size, min(start, _ZIP64_MARKER), 0)
    if start < _ZIP64_MARKER:
        return entries + end
    wide = _ZIP64_END_RECORD.pack(
        b"PK\x06\x06", _ZIP64_END_RECORD.size - 12, _VERSION_64, _VERSION_64, 0, 0, count, count, size, start
    )
    return entries + wide + _ZIP64_LOCATOR.pack(b"PK\x06\x07", 0, start + size, 1) + end


def _pack_extra_64(*numbers: int) -> bytes:
    return _EXTRA_HEADER.pack(_ZIP64_EXTRA_ID, len(numbers) * _ZIP64_SIZE.size) + b"".join(
        map(_ZIP64_SIZE.pack, numbers)
    )


@dataclass(frozen=True, slots=True)
class _Call:
    """An object that is pickled as a call of a function."""

    function: Callable[..., object]
    arguments: tuple[object, ...]

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.function, self.arguments


@dataclass(frozen=True, slots=True)
class _Storage:
    """An object that is pickled as a reference to a storage outside of the pickle."""

    kind: type
    elements: int


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: object) -> object:
        return ("storage", obj.kind, "0", "cpu", obj.elements) if isinstance(obj, _Storage) else None


def _pickle_tensor(dtype: str, shape: Sequence[int]) -> bytes:
    """Return the pickle of a tensor: a view of a storage, whose dtype is given by the storage's type or an argument."""
    hooks: OrderedDict[str, object] = OrderedDict()
    view = (0, tuple(shape), row_major(shape), False, hooks)
    size = tensor_bytes(dtype, shape)
    if dtype in _TYPES:
        storage = _Storage(_TYPES[dtype], size // DTYPES[dtype].itemsize)
        call = _Call(torch._utils._rebuild_tensor_v2, (storage, *view))
    else:
        storage = _Storage(torch.UntypedStorage, size)
        call = _Call(torch._utils._rebuild_tensor_v3, (storage, *view, DTYPES[dtype]))
    stream = io.BytesIO()
    _Pickler(stream, protocol=2).dump(call)
    return stream.getvalue()
