"""The process of one started rank: it ends with its parent, and it ends at once when its work is done."""

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
"""Seconds between two looks at the parent."""
_PR_SET_PDEATHSIG = 1


def is_worker_process() -> bool:
    """Say whether this process is a rank that torchrun, or `launch`, has started."""
    return "TORCHELASTIC_RUN_ID" in os.environ and "RANK" in os.environ


def die_with_parent(parent: int) -> None:
    """End this process soon after its parent is gone, however that ended.

    Args:
        parent: process id that started this one; it may be gone already.
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
    """End this process with an exit code, all written, without the interpreter's own ending.

    Gloo's threads live on after their process group is destroyed, and now and then the interpreter's ending under
    them aborts a process whose work is done.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
