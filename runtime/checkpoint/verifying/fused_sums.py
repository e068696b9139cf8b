"""The sums of digests by one Triton kernel, where Triton is there and sums right, which is tried once per device."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from threading import Lock
from typing import NamedTuple, Protocol, cast

import numpy as np
import torch

from plans.text import first_line
from runtime.checkpoint.digest import Digest, word_weights
from runtime.tensor_map.strided_copy import Stride, StridedCopy

__all__ = ["FusedSums", "Place", "SumRange", "find_fused_sums"]


class Place(NamedTuple):
    """Where in memory the bytes of a copy go.

    Args:
        address: the address of the first.
        strides: the bytes between the steps of each of the copy's strides.
    """

    address: int
    strides: tuple[int, ...] = ()


class SumRange(NamedTuple):
    """Bytes whose sums are taken.

    Args:
        content: the bytes, one-dimensional and contiguous.
        copy: a copy from offsets in them to offsets in the parameter whose number is its destination.
        place: where to write them; None to write them nowhere.
    """

    content: torch.Tensor
    copy: StridedCopy
    place: Place | None = None


_UNITS = (8, 4, 2, 1)
_MAX_BYTES = 2**30
"""The kernel counts a range's units in 32 bits."""


@lru_cache
def find_fused_sums(device: torch.device) -> FusedSums | None:
    """Return the fused sums for a device, None if it is no GPU or Triton cannot be used there.

    Args:
        device: the device that the bytes are on.
    """
    if device.type != "cuda":
        return None
    try:
        from runtime.checkpoint.verifying import sum_kernel
    except ImportError:
        return None
    sums = FusedSums(cast("SumKernel", sum_kernel), device)
    try:
        problem = "" if sums.matches_definition() else "its sums are wrong"
    except Exception as error:  # Triton compiles here, for which a machine may lack a compiler, or much else.
        problem = first_line(error)
    if problem:
        warnings.warn(
            f"Triton cannot be used, so digests on {device} are computed more slowly: {problem}", stacklevel=2
        )
        return None
    return sums


class SumKernel(Protocol):
    """The module with the kernel, which cannot be imported without Triton."""

    FIELDS: int
    MAX_DIMS: int

    def launch_sums(
        self, ranges: torch.Tensor, inner_weights: torch.Tensor, totals: torch.Tensor, unit: int, dims: int, most: int
    ) -> None:
        """Start the kernel on the current stream."""


class FusedSums:
    """Launches the kernel for ranges of bytes, once for each width of unit that they allow."""

    def __init__(self, kernel: SumKernel, device: torch.device) -> None:
        """Upload the inner weights.

        Args:
            kernel: the module with the kernel.
            device: the device that the bytes are on.
        """
        self._kernel, self._device = kernel, device
        weights = np.stack([word_weights(0), word_weights(1)]).view(np.int64)
        self._inner_weights = torch.from_numpy(weights).to(device)
        self._compiled: set[tuple[int, int]] = set()
        self._lock = Lock()

    def __call__(self, ranges: Sequence[SumRange], totals: torch.Tensor) -> None:
        """Add ranges to totals on the current stream, and write those that have a place, without waiting for it."""
        by_kind: defaultdict[tuple[int, int], list[list[int]]] = defaultdict(list)
        for content, copy, place in ranges:
            address = content.data_ptr()
            for part, part_place in _split_large(copy, place, self._kernel.MAX_DIMS):
                unit, row = _build_row(address, part, part_place, self._kernel.FIELDS)
                by_kind[unit, self._kernel.MAX_DIMS if part.strides else 0].append(row)
        for kind, rows in by_kind.items():
            if kind in self._compiled:
                self._launch(kind, rows, totals)
                continue
            with self._lock:  # or every thread would compile it
                self._launch(kind, rows, totals)
                self._compiled.add(kind)

    def matches_definition(self) -> bool:
        """Return whether the sums of some bytes on this device are those that the definition gives."""
        content = np.arange(40_000, dtype=np.uint8)
        expected = Digest()
        expected.add(16, content)
        totals = torch.zeros(1, 2, dtype=torch.int64, device=self._device)
        self([SumRange(torch.from_numpy(content).to(self._device), StridedCopy(0, 0, 0, 16, len(content)))], totals)
        return [lane % 2**64 for lane in totals[0].tolist()] == [expected.lane1, expected.lane2]

    def _launch(self, kind: tuple[int, int], rows: list[list[int]], totals: torch.Tensor) -> None:
        # torch reuses neither end of the upload before the stream is done with it.
        table = torch.empty(len(rows), len(rows[0]), dtype=torch.int64, pin_memory=self._device.type == "cuda")
        table.numpy()[...] = rows
        most = max(row[4] for row in rows)
        self._kernel.launch_sums(table.to(self._device, non_blocking=True), self._inner_weights, totals, *kind, most)


def _split_large(copy: StridedCopy, place: Place | None, max_dims: int) -> Iterator[tuple[StridedCopy, Place | None]]:
    """Yield a copy in parts that the kernel can count and has dims for."""
    if copy.size <= _MAX_BYTES and len(copy.strides) <= max_dims:
        yield copy, place
        return
    if not copy.strides:
        for start in range(0, copy.length, _MAX_BYTES):
            part = copy._replace(
                source_offset=copy.source_offset + start,
                destination_offset=copy.destination_offset + start,
                length=min(_MAX_BYTES, copy.length - start),
            )
            yield part, place and Place(place.address + start)
        return
    (steps, source, destination), inner = copy.strides[0], copy.strides[1:]
    halves = (0, steps // 2, steps) if len(copy.strides) <= max_dims else range(steps + 1)
    for first, last in pairwise(halves):
        is_repeated = last - first > 1
        part = copy._replace(
            source_offset=copy.source_offset + first * source,
            destination_offset=copy.destination_offset + first * destination,
            strides=(Stride(last - first, source, destination), *inner) if is_repeated else inner,
        )
        part_place = place and Place(
            place.address + first * place.strides[0], place.strides if is_repeated else place.strides[1:]
        )
        yield from _split_large(part, part_place, max_dims)


def _build_row(address: int, copy: StridedCopy, place: Place | None, fields: int) -> tuple[int, list[int]]:
    """Return the widest unit that a copy allows, and what the kernel is told of it."""
    start = address + copy.source_offset
    target, written_strides = place or (0, (0,) * len(copy.strides))
    numbers = start | target | copy.destination_offset | copy.length
    for (_, source, destination), written in zip(copy.strides, written_strides, strict=True):
        numbers |= source | destination | written
    unit = next(unit for unit in _UNITS if not numbers % unit)
    row = [start, target, copy.destination_offset, copy.destination, copy.size // unit, copy.length // unit]
    for (steps, source, destination), written in zip(reversed(copy.strides), reversed(written_strides), strict=True):
        row += (steps, source // unit, written // unit, destination)
    row += [1, 0, 0, 0] * ((fields - len(row)) // 4)
    return unit, row
