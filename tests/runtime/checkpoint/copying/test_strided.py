"""Gathering: strided bytes become contiguous ones, without new memory for each range."""

from __future__ import annotations

import tracemalloc

import numpy as np

from runtime.checkpoint.copying.strided import gather_contiguous
from runtime.tensor_map.strided_copy import Stride, StridedCopy

ROWS, WIDTH = 4096, 1024
SLAB = np.random.default_rng(0).integers(0, 256, (ROWS, WIDTH), np.uint8)
LEFT_HALVES = StridedCopy(0, 0, 0, 0, WIDTH // 2, (Stride(ROWS, WIDTH, WIDTH // 2),))
"""The left halves of all rows, one behind the other."""


def gather() -> None:
    ((offset, content),) = gather_contiguous(LEFT_HALVES, SLAB.reshape(-1), 0)
    assert offset == 0
    assert np.array_equal(content.reshape(ROWS, -1), SLAB[:, : WIDTH // 2])


def test_a_thread_gathers_into_one_buffer() -> None:
    gather()
    tracemalloc.start()
    try:
        list(gather_contiguous(LEFT_HALVES, SLAB.reshape(-1), 0))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < SLAB.size // 32
