"""Safetensors files: headers of untrusted files read and checked, and headers written."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

from plans.errors import HeaderError
from runtime.checkpoint.files.reading import (
    is_size,
    open_descriptor,
    open_regular,
    parse_strict_json,
    read_exactly,
    truncation_error,
)
from runtime.formats import PREFIX_BYTES, check_not_other_format

__all__ = [
    "BITS",
    "MAX_HEADER",
    "Header",
    "StoredTensor",
    "encode_header",
    "find_dtypes",
    "has_same_bytes",
    "is_length_right",
    "pad_header",
    "parse_header",
    "read_header",
    "tensor_bytes",
]

BITS: Mapping[str, int] = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "BOOL": 8, "U8": 8, "I8": 8,
    "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
"""Bits of one element, by safetensors' name of the dtype."""
MAX_HEADER = 100_000_000
"""The most bytes that the JSON of a header may have, as the format limits it."""

_LENGTH = struct.Struct("<Q")
_MAX_DIMS = 64
_HINT = "the file is damaged or was not written by safetensors; download or save it again"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor in a safetensors file.

    Args:
        file: the file's path.
        dtype: the safetensors name of its dtype.
        shape: its sizes per tensor dim.
        offset: the offset of its first byte in the file.
        size: its size in bytes.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Header:
    """The header of a safetensors file: its metadata, its tensors in the order of their bytes, and its own bytes."""

    file: Path
    metadata: Mapping[str, str]
    tensors: Mapping[str, StoredTensor]
    content: bytes = field(default=b"", repr=False, compare=False)

    @property
    def is_canonical(self) -> bool:
        """Whether `encode_header` makes the same bytes of the header's tensors and metadata."""
        rows = ((name, tensor.dtype, tensor.shape) for name, tensor in self.tensors.items())
        return encode_header(rows, self.metadata) == self.content


def tensor_bytes(dtype: str, shape: Sequence[int]) -> int:
    """Return the size in bytes of a tensor, whose elements must fill whole bytes."""
    bits = BITS[dtype] * prod(shape)
    assert bits % 8 == 0
    return bits // 8


def find_dtypes(parts: Iterable[tuple[str, StoredTensor]], where: str = "elsewhere") -> dict[str, str]:
    """Return the dtype of each tensor that files store in parts.

    Args:
        parts: each part's tensor name and stored tensor.
        where: where the other parts of a tensor are, for the error message.

    Raises:
        HeaderError: parts of one tensor have different dtypes.
    """
    dtypes: dict[str, str] = {}
    for name, stored in parts:
        if dtypes.setdefault(name, stored.dtype) != stored.dtype:
            raise HeaderError(
                f"{stored.file}: {name!r} is {stored.dtype}, {where} {dtypes[name]}",
                hint="the files belong to several checkpoints; save the model again into an empty folder",
                tensor=name,
            )
    return dtypes


def read_header(file: Path) -> Header:
    """Read and check a file's header, which must agree with the file's size to the byte.

    Raises:
        IncompleteError: the file ends before its header or its tensors do.
        HeaderError: the header is malformed, its tensors overlap or leave holes, or a dtype is unknown.
        CheckpointError: the file is not a regular file, or cannot be read.

    Source: the safetensors format, https://github.com/huggingface/safetensors#format
    """
    with open_regular(file) as stream:
        size = os.fstat(stream.fileno()).st_size
        prefix = stream.read(_LENGTH.size)
        if len(prefix) < _LENGTH.size:
            check_not_other_format(file, prefix)
            raise truncation_error(file, size, _LENGTH.size)
        (length,) = _LENGTH.unpack(prefix)
        if length > MAX_HEADER or size < _LENGTH.size + length:
            check_not_other_format(file, prefix + stream.read(PREFIX_BYTES))
        if length > MAX_HEADER:
            raise HeaderError(
                f"{file}: a header of {length} bytes exceeds the format's limit", hint=_HINT, file=str(file)
            )
        if size < _LENGTH.size + length:
            raise truncation_error(file, size, _LENGTH.size + length)
        content = prefix + stream.read(length)
    return parse_header(file, content, size)


def parse_header(file: Path, content: bytes, size: int) -> Header:
    """Parse and check the bytes of a header.

    Args:
        file: the file's path.
        content: all bytes before the tensors.
        size: the size of the file in bytes.

    Raises:
        IncompleteError: the file is too small for its tensors.
        HeaderError: the header is malformed, its tensors overlap or leave holes, or a dtype is unknown.
    """
    entries = parse_strict_json(content[_LENGTH.size :], file)
    # As in safetensors itself, null says the same as no entry.
    metadata = _parse_metadata(file, entries.pop("__metadata__", None))
    begin = len(content)
    tensors = {name: _parse_tensor(file, name, entry, begin) for name, entry in entries.items()}
    ordered = dict(sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].size)))
    _check_contiguous(file, ordered, begin, size)
    return Header(file, metadata, ordered, content)


def encode_header(tensors: Iterable[tuple[str, str, Sequence[int]]], metadata: Mapping[str, str]) -> bytes:
    """Return the header of a file that contains the tensors one after the other, padded to eight bytes.

    Args:
        tensors: the name, dtype and shape of each, in the order of their bytes.
        metadata: written as given, and omitted if empty.
    """
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, dtype, shape in tensors:
        stop = offset + tensor_bytes(dtype, shape)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return _LENGTH.pack(len(text)) + text


def is_length_right(header: bytes) -> bool:
    """Return whether the bytes of a header begin with the length of what follows."""
    return len(header) >= _LENGTH.size and _LENGTH.unpack_from(header)[0] == len(header) - _LENGTH.size


def pad_header(header: bytes, count: int) -> bytes:
    """Return a header with so many more spaces after its JSON, which readers skip."""
    text = header[_LENGTH.size :] + b" " * count
    return _LENGTH.pack(len(text)) + text


def _parse_tensor(file: Path, name: str, entry: object, begin: int) -> StoredTensor:
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [start, stop], **rest} if not rest:
            pass
        case _:
            raise _tensor_error(file, name, "has no well-formed dtype, shape and data_offsets")
    if dtype not in BITS:
        raise _tensor_error(file, name, f"has the unknown dtype {dtype!r}")
    if len(shape) > _MAX_DIMS or not all(map(is_size, (*shape, start, stop))):
        raise _tensor_error(file, name, "has sizes or offsets that are not integers in range")
    bits = BITS[dtype] * prod(shape)
    if bits % 8 or start > stop or bits // 8 != stop - start:
        raise _tensor_error(file, name, f"is {dtype} {shape} but spans {stop - start} bytes")
    return StoredTensor(file, dtype, tuple(shape), begin + start, stop - start)


def _check_contiguous(file: Path, tensors: Mapping[str, StoredTensor], begin: int, size: int) -> None:
    cursor = begin
    for name, tensor in tensors.items():
        if tensor.offset != cursor:
            what = "overlaps the tensor before it" if tensor.offset < cursor else "leaves a hole before it"
            raise _tensor_error(file, name, what)
        cursor += tensor.size
    if size < cursor:
        raise truncation_error(file, size, cursor)
    if size > cursor:
        raise HeaderError(f"{file}: {size - cursor} bytes follow the last tensor", hint=_HINT, file=str(file))


def _parse_metadata(file: Path, value: object) -> Mapping[str, str]:
    if value is None:
        return {}
    if isinstance(value, dict) and all(isinstance(item, str) for item in value.values()):
        return value
    raise HeaderError(f"{file}: __metadata__ is not an object of strings", hint=_HINT, file=str(file))


def _tensor_error(file: Path, name: str, what: str) -> HeaderError:
    return HeaderError(f"{file}: tensor {name!r} {what}", hint=_HINT, file=str(file), tensor=name)


_PART = 2**20


def has_same_bytes(first: StoredTensor, second: StoredTensor) -> bool:
    """Return whether two stored tensors are equal bit for bit, dtype and shape included; memory stays bounded.

    Raises:
        IncompleteError: a file ends before its tensor does.
        CheckpointError: a file cannot be read.
    """
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    if first == second:
        return True
    parts = bytearray(min(_PART, first.size)), bytearray(min(_PART, first.size))
    with open_descriptor(first.file) as first_file, open_descriptor(second.file) as second_file:
        for start in range(0, first.size, _PART):
            for descriptor, tensor, part in ((first_file, first, parts[0]), (second_file, second, parts[1])):
                wanted = memoryview(part)[: tensor.size - start]
                read_exactly(descriptor, wanted, tensor.offset + start, tensor.file)
            # After a last part that is short, the buffers still hold equal bytes of the part before.
            if parts[0] != parts[1]:
                return False
    return True
