"""The first element in which two copies of a tensor differ, wherever their bytes lie, in bounded memory."""

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
"""So many elements fill whole bytes, however many bits one has."""


@dataclass(frozen=True, slots=True)
class MappedTensor:
    """A whole tensor and where its bytes are.

    Args:
        tensor_map: of the tensor over the pieces.
        chunks: what files store, by name.
    """

    tensor_map: TensorMap
    chunks: Mapping[str, StoredTensor]


@dataclass(frozen=True, slots=True)
class ElementValue:
    """One element.

    Args:
        bits: in hexadecimal, the highest first.
        number: that they mean, in words where JSON has no such number; None where torch lacks the dtype.
    """

    bits: str
    number: float | int | bool | str | None

    def to_json(self) -> dict[str, object]:
        """Return the value for other programs."""
        return {"number": self.number, "bits": self.bits}

    def __str__(self) -> str:
        return f"0x{self.bits}" if self.number is None else f"{self.number} (0x{self.bits})"


@dataclass(frozen=True, slots=True)
class ElementDifference:
    """An element that is not the same in two copies of a tensor.

    Args:
        index: in the whole tensor, per tensor dim.
        expected: its value in the copy that is right.
        found: in the other one.
    """

    index: tuple[int, ...]
    expected: ElementValue
    found: ElementValue

    def to_json(self) -> dict[str, object]:
        """Return the element for other programs."""
        values = {"expected": self.expected.to_json(), "found": self.found.to_json()}
        return {"index": list(self.index), **values}


def find_first_difference(
    expected: MappedTensor, found: MappedTensor, dtype: str, *, max_memory: int
) -> ElementDifference | None:
    """Return the first element, in row-major order, that differs between two tensors of one shape and dtype.

    Args:
        expected: the tensor that is right.
        found: the other one.
        dtype: of both, safetensors' name.
        max_memory: bytes that reading may allocate, the two blocks that are compared included.
    """
    assert expected.tensor_map.shape == found.tensor_map.shape
    limit = max(1, max_memory // 8)  # rows go straight to their places, so that reading takes half of it at most
    for start, *blocks in _split_blocks(expected.tensor_map, found.tensor_map, BITS[dtype], limit):
        placed = zip((expected, found), blocks, strict=True)
        one, other = (_read_bytes(MappedTensor(block, side.chunks), dtype, max_memory) for side, block in placed)
        differing = np.flatnonzero(one != other)
        if len(differing):
            return _build_element(int(differing[0]), start, one, other, dtype, expected.tensor_map.shape)
    return None


def _split_blocks(
    one: TensorMap, other: TensorMap, bits: int, limit: int, start: int = 0
) -> Iterator[tuple[int, TensorMap, TensorMap]]:
    """Yield parts of two forms that are contiguous in their tensors, with the flat number of their first element."""
    dim = next((dim for dim, count in enumerate(one.shape) if count > 1), None)
    if dim is None or prod(one.shape) * bits // 8 <= limit:
        yield start, one, other
        return
    elements = prod(one.shape[dim + 1 :])
    step = max(1, limit * 8 // bits // elements)
    if step * elements * bits % 8:
        step += -step % _ALIGNED_ELEMENTS
    if step >= one.shape[dim]:
        yield start, one, other
        return
    for first in range(0, one.shape[dim], step):
        length = min(step, one.shape[dim] - first)
        part, counterpart = (narrow(form, dim, first, length) for form in (one, other))
        yield from _split_blocks(part, counterpart, bits, limit, start + first * elements)


def _read_bytes(tensor: MappedTensor, dtype: str, max_memory: int) -> Bytes:
    content = np.zeros(tensor_bytes(dtype, tensor.tensor_map.shape), np.uint8)
    sources = {name: tensor.chunks[name] for name in tensor.tensor_map.sources}
    table = build_copy_plan(sources, [(Destination("", len(content)), tensor.tensor_map)])
    execute_copy_plan(table, [MemoryRegion(content)], max_memory=max_memory)
    return content


def _build_element(
    byte: int, start: int, one: Bytes, other: Bytes, dtype: str, shape: tuple[int, ...]
) -> ElementDifference:
    """Return the element that begins in the first byte that differs, or before it."""
    bits = BITS[dtype]
    first, last = byte * 8 // bits, (byte * 8 + 7) // bits
    pairs = (
        (number, _read_value(one, number, dtype), _read_value(other, number, dtype))
        for number in range(first, last + 1)
    )
    number, expected, found = next(pair for pair in pairs if pair[1].bits != pair[2].bits)
    return ElementDifference(unravel(start + number, shape), expected, found)


def _read_value(content: Bytes, number: int, dtype: str) -> ElementValue:
    bits = BITS[dtype]
    begin, end = number * bits // 8, -(-(number + 1) * bits // 8)
    whole = int.from_bytes(content[begin:end].tobytes(), "little")
    found = whole >> (number * bits % 8) & (2**bits - 1)
    return ElementValue(f"{found:0{-(-bits // 4)}x}", _decode_number(content[begin:end], dtype))


def _decode_number(content: Bytes, dtype: str) -> float | int | bool | str | None:
    """Return what an element's bytes mean; F4 and F6 have no dtype of whole elements in torch."""
    if dtype not in DTYPES:
        return None
    number: float | int | bool | complex = torch.from_numpy(content.copy()).view(DTYPES[dtype]).item()
    return str(number) if isinstance(number, complex) or not math.isfinite(number) else number
