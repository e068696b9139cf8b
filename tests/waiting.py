"""Waiting in tests: for events, never for a time to pass."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

__all__ = ["HANG_TIMEOUT", "is_running", "wait_until"]

HANG_TIMEOUT = 600.0
"""Seconds after which something counts as hanging. It ends a suite that would never end; no outcome depends on it."""
_POLL_SECONDS = 0.01


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[Any] | None = None) -> None:
    """Return once a condition holds.

    Args:
        condition: the condition to wait for, such as `path.exists`.
        process: the process that brings it about; the test fails at once if it ends without doing so.
    """
    deadline = time.monotonic() + HANG_TIMEOUT
    while not condition():
        if process is not None and process.poll() is not None and not condition():
            pytest.fail(f"the process exited with {process.returncode}: {process.communicate()}")
        if time.monotonic() > deadline:
            pytest.fail(f"the condition does not hold after {HANG_TIMEOUT:g} seconds")
        time.sleep(_POLL_SECONDS)


def is_running(process: int) -> bool:
    """Return whether a process exists and has not ended; one that only waits to be reaped has."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in ("Z", "X")
