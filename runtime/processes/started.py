"""A started rank's own process: it dies with its parent, and exits at once when its work is done. Imports no torch."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from typing import NoReturn

__all__ = ["die_with_parent", "exit_now", "is_worker_process"]

_PARENT_POLL_SECONDS = 0.5
"""Seconds between two checks that the parent is alive."""
_PR_SET_PDEATHSIG = 1


def is_worker_process() -> bool:
    """Return whether this process is a rank started by torchrun or `launch`."""
    return "TORCHELASTIC_RUN_ID" in os.environ and "RANK" in os.environ


def die_with_parent(parent: int) -> None:
    """End this process soon after its parent ends, however that happens.

    Args:
        parent: the process id of the parent, which may be gone already.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_PARENT_POLL_SECONDS)
        os._exit(1)

    if os.getppid() != parent:
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()


def exit_now(code: int) -> NoReturn:
    """Flush the standard streams and exit with a code, skipping the interpreter's own shutdown.

    Gloo's threads outlive their process group, and an interpreter that shuts down under them occasionally aborts a
    process whose work is done.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
