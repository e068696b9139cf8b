"""Pausing Python's cyclic garbage collector while objects are built that all stay alive."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["gc_paused"]


@contextmanager
def gc_paused() -> Iterator[None]:
    """Pause the collector in the body, or in the decorated function; a collector that was off before stays off.

    Importing torch and transformers, planning a reshard and reading a source tree allocate many objects and free few.
    The collector finds nothing there, but takes up to a quarter of the time, and it stops all threads meanwhile.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
