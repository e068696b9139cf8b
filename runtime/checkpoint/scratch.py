"""Memory that a thread keeps for its intermediate results, because a system may give fresh pages at a crawl.

On one virtual machine, memory that had been touched before was copied at 25 GB/s, and memory touched for the first time
at 0.32 GB/s: an allocation for every slab would cost more than the slab's copy.
"""

from __future__ import annotations

from math import prod
from threading import local
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

__all__ = ["Scratch"]


class Scratch(local):
    """A buffer of the current thread, as large as the largest array that was asked for."""

    def __init__(self) -> None:
        self._buffer = np.empty(0, np.uint8)

    def get_array(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """Return an array of any content, which is valid until this thread asks for the next one."""
        size = prod(shape) * np.dtype(dtype).itemsize
        if len(self._buffer) < size:
            self._buffer = np.empty(size, np.uint8)
        return self._buffer[:size].view(dtype).reshape(shape)
