"""The first element in which two copies of a tensor differ, found in bounded memory, whatever files store them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

import numpy as np
import torch

from runtime.checkpoint.copying.copy import execute_copy_plan
from runtime.checkpoint.copying.copy_plan import Destination, build_copy_plan
from runtime.checkpoint.copying.regions import MemoryRegion
from runtime.checkpoint.copying.strided import Bytes
from runtime.checkpoint.files.safetensors import BITS, StoredTensor, tensor_bytes
from runtime.models.dtypes import DTYPES
from runtime.tensor_map.tensor_map import TensorMap, narrow, unravel

__all__ = ["ElementDifference", "ElementValue", "MappedTensor", "find_first_difference"]

_ALIGNED_ELEMENTS = 8
"""Elements that fill whole bytes, whatever the width of one in bits."""


@dataclass(frozen=True, slots=True)
class MappedTensor:
    """A whole tensor and where its bytes are stored.

    Args:
        dtype: the dtype by its name in safetensors.
        tensor_map: the tensor over the stored chunks.
        chunks: the stored chunks by name.
    """

    dtype: str
    tensor_map: TensorMap
    chunks: Mapping[str, StoredTensor]


@dataclass(frozen=True, slots=True)
class ElementValue:
    """The value of an element.

    Args:
        bits: its bits in hexadecimal, the highest first.
        number: its numeric value, as text if JSON has no such number; None if torch lacks the dtype.
    """

    bits: str
    number: float | int | bool | str | None

    def to_json(self) -> dict[str, object]:
        """Return the JSON form."""
        return {"number": self.number, "bits": self.bits}

    def __str__(self) -> str:
        return f"0x{self.bits}" if self.number is None else f"{self.number} (0x{self.bits})"


@dataclass(frozen=True, slots=True)
class ElementDifference:
    """An element that differs between two copies of a tensor.

    Args:
        index: its index in the whole tensor, per tensor dim.
        expected: its value in the copy that is right.
        found: its value in the other copy.
    """

    index: tuple[int, ...]
    expected: ElementValue
    found: ElementValue

    def to_json(self) -> dict[str, object]:
        """Return the JSON form."""
        values = {"expected": self.expected.to_json(), "found": self.found.to_json()}
        return {"index": list(self.index), **values}


def find_first_difference(expected: MappedTensor, found: MappedTensor, *, max_memory: int) -> ElementDifference | None:
    """Return the first element, in row-major order, that differs between two tensors of one shape and dtype.

    Args:
        expected: the tensor that is right.
        found: the other tensor.
        max_memory: the bytes that reading may allocate, the two blocks that are compared included.
    """
    shape, dtype = expected.tensor_map.shape, expected.dtype
    assert (shape, dtype) == (found.tensor_map.shape, found.dtype)
    limit = max(1, max_memory // 8)  # rows go straight to their places, so that reading takes half of it at most
    for start, *blocks in _split_blocks(expected.tensor_map, found.tensor_map, BITS[dtype], limit):
        right, other = (
            _read_bytes(side, block, max_memory) for side, block in zip((expected, found), blocks, strict=True)
        )
        differing = np.flatnonzero(right != other)
        if len(differing):
            return _build_element(int(differing[0]), start, right, other, dtype, shape)
    return None


def _split_blocks(
    expected: TensorMap, found: TensorMap, bits: int, limit: int, start: int = 0
) -> Iterator[tuple[int, TensorMap, TensorMap]]:
    """Yield parts of two tensors that are contiguous in them, with the flat index of their first element."""
    shape = expected.shape
    dim = next((dim for dim, size in enumerate(shape) if size > 1), None)
    if dim is None or prod(shape) * bits // 8 <= limit:
        yield start, expected, found
        return
    elements = prod(shape[dim + 1 :])
    step = max(1, limit * 8 // bits // elements)
    if step * elements * bits % 8:
        step += -step % _ALIGNED_ELEMENTS
    if step >= shape[dim]:
        yield start, expected, found
        return
    for first in range(0, shape[dim], step):
        length = min(step, shape[dim] - first)
        parts = narrow(expected, dim, first, length), narrow(found, dim, first, length)
        yield from _split_blocks(*parts, bits, limit, start + first * elements)


def _read_bytes(tensor: MappedTensor, block: TensorMap, max_memory: int) -> Bytes:
    content = np.zeros(tensor_bytes(tensor.dtype, block.shape), np.uint8)
    sources = {name: tensor.chunks[name] for name in block.sources}
    copy_plan = build_copy_plan(sources, [(Destination("", len(content)), block)])
    execute_copy_plan(copy_plan, [MemoryRegion(content)], max_memory=max_memory)
    return content


def _build_element(
    byte: int, start: int, expected: Bytes, found: Bytes, dtype: str, shape: tuple[int, ...]
) -> ElementDifference:
    """Return the differing element that the first differing byte belongs to; elements may be smaller than a byte."""
    bits = BITS[dtype]
    for number in range(byte * 8 // bits, (byte * 8 + 7) // bits + 1):
        values = _read_value(expected, number, dtype), _read_value(found, number, dtype)
        if values[0].bits != values[1].bits:
            return ElementDifference(unravel(start + number, shape), *values)
    raise AssertionError("the byte differs, so one of its elements does")


def _read_value(content: Bytes, number: int, dtype: str) -> ElementValue:
    bits = BITS[dtype]
    begin, end = number * bits // 8, -(-(number + 1) * bits // 8)
    word = int.from_bytes(content[begin:end].tobytes(), "little") >> (number * bits % 8) & (2**bits - 1)
    return ElementValue(f"{word:0{-(-bits // 4)}x}", _decode_number(content[begin:end], dtype))


def _decode_number(content: Bytes, dtype: str) -> float | int | bool | str | None:
    """Return the number that an element's bytes encode; torch has no dtype of single F4 or F6 elements."""
    if dtype not in DTYPES:
        return None
    number: float | int | bool | complex = torch.from_numpy(content.copy()).view(DTYPES[dtype]).item()
    return str(number) if isinstance(number, complex) or not math.isfinite(number) else number
