"""Thread ranks with the interface of the pool of processes, so that a test can run on either."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from runtime import run_on_ranks
from tests.waiting import HANG_TIMEOUT


class ThreadPool:
    """`world_size` ranks as threads of this process, anew for each function."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size

    def run(self, function: Callable[..., Any], *args: object) -> list[Any]:
        """Call a function on every rank and return what each returned; the first failure is raised."""
        return run_on_ranks(lambda: function(*args), self.world_size, timeout=HANG_TIMEOUT)
