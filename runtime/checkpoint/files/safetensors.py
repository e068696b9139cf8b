"""Safetensors headers, read without trust and written: an eight-byte length, JSON, then the tensors' bytes."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from plans.errors import HeaderError
from runtime.checkpoint.files.reading import open_descriptor, open_regular, read_exactly, truncation_error
from runtime.checkpoint.files.strict_json import parse_strict_json

__all__ = [
    "BITS",
    "Header",
    "StoredTensor",
    "encode_header",
    "find_dtypes",
    "has_same_bytes",
    "pad_header",
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
_LENGTH = struct.Struct("<Q")
_MAX_HEADER = 100_000_000
_MAX_DIMS = 64
_MAX_SIZE = 2**63 - 1
_HINT = "the file is damaged or was not written by safetensors; download or save it again"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor in a safetensors file.

    Args:
        file: the file's path.
        dtype: safetensors' name.
        shape: sizes per tensor dim.
        offset: of its first byte in the file.
        size: in bytes.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Header:
    """What a safetensors file says about itself: metadata, and tensors in the order of their bytes."""

    file: Path
    metadata: Mapping[str, str]
    tensors: Mapping[str, StoredTensor]


def tensor_bytes(dtype: str, shape: Sequence[int]) -> int:
    """Return the bytes of a tensor whose elements fill whole bytes."""
    bits = BITS[dtype] * prod(shape)
    assert bits % 8 == 0
    return bits // 8


def find_dtypes(parts: Iterable[tuple[str, StoredTensor]], where: str = "elsewhere") -> dict[str, str]:
    """Return the dtype of each tensor that files hold in parts.

    Args:
        parts: a tensor's name with what is stored of it.
        where: the other parts are, in words.

    Raises:
        HeaderError: parts of one tensor have several.
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
    """Read and check a file's header; what it says and the file's size must agree to the byte.

    Raises:
        IncompleteError: the file ends before its header or its tensors do.
        HeaderError: the header is malformed, overlaps, leaves holes or names unknown dtypes.
        CheckpointError: it is no regular file, or cannot be read.

    Source: the safetensors format, https://github.com/huggingface/safetensors#format
    """
    with open_regular(file) as stream:
        size = os.fstat(stream.fileno()).st_size
        prefix = stream.read(_LENGTH.size)
        if len(prefix) < _LENGTH.size:
            raise truncation_error(file, size, _LENGTH.size)
        (length,) = _LENGTH.unpack(prefix)
        if length > _MAX_HEADER:
            what = f"a header of {length} bytes is over the format's limit"
            raise HeaderError(f"{file}: {what}", hint=_HINT, file=str(file))
        if size < _LENGTH.size + length:
            raise truncation_error(file, size, _LENGTH.size + length)
        entries = parse_strict_json(stream.read(length), file)
    metadata = _parse_metadata(file, entries.pop("__metadata__", {}))
    begin = _LENGTH.size + length
    tensors = {name: _parse_tensor(file, name, entry, begin) for name, entry in entries.items()}
    ordered = dict(sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].size)))
    _check_contiguous(file, ordered, begin, size)
    return Header(file, metadata, ordered)


def encode_header(tensors: Iterable[tuple[str, str, Sequence[int]]], metadata: Mapping[str, str]) -> bytes:
    """Return the header of a file that holds the tensors one after the other, padded to eight bytes.

    Args:
        tensors: name, dtype and shape of each, in the order of their bytes.
        metadata: kept as given; left out when empty.
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


def pad_header(header: bytes, count: int) -> bytes:
    """Return a header with so many more spaces behind its JSON, which readers skip."""
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
    if len(shape) > _MAX_DIMS or not all(_is_size(number) for number in (*shape, start, stop)):
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
    if isinstance(value, dict) and all(isinstance(item, str) for item in value.values()):
        return value
    raise HeaderError(f"{file}: __metadata__ is not a table of strings", hint=_HINT, file=str(file))


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value <= _MAX_SIZE


def _tensor_error(file: Path, name: str, what: str) -> HeaderError:
    return HeaderError(f"{file}: tensor {name!r} {what}", hint=_HINT, file=str(file), tensor=name)


_PART = 2**20


def has_same_bytes(first: StoredTensor, second: StoredTensor) -> bool:
    """Return whether two stored tensors are equal bit for bit, dtype and shape included.

    Raises:
        IncompleteError: a file ends before its tensor does.
        CheckpointError: a file cannot be read.
    """
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    parts = bytearray(min(_PART, first.size)), bytearray(min(_PART, first.size))
    with open_descriptor(first.file) as one, open_descriptor(second.file) as other:
        for start in range(0, first.size, _PART):
            for descriptor, tensor, part in ((one, first, parts[0]), (other, second, parts[1])):
                wanted = memoryview(part)[: tensor.size - start]
                read_exactly(descriptor, wanted, tensor.offset + start, tensor.file)
            # Behind a last part that is short lies what was read before, and was the same.
            if parts[0] != parts[1]:
                return False
    return True
