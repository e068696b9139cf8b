"""Runs in processes of their own that are killed at a chosen point of their work; no clock decides when."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

from runtime.checkpoint.copying.journal import Journal, read_journal
from runtime.checkpoint.files.file_names import MARKER
from runtime.checkpoint.resharding.execute import ReshardOptions, execute_reshard
from runtime.checkpoint.resharding.plan import ReshardPlan

SMALL = 2**20
"""So little memory that even a tiny checkpoint takes many units of work."""

_record = Journal.record


def record_synchronously(journal: Journal, units: int, bytes_done: int) -> None:
    """Record as `Journal.record` does, and wait until the entry is on the disk.

    With an interval of 0, every unit but the last is then recorded before the next one begins.
    """
    _record(journal, units, bytes_done)
    journal._wait_for_pending()


def fork(run: Callable[[], object]) -> int:
    """Start a process that calls a function and ends, and return its id."""
    if child := os.fork():
        return child
    try:
        run()
        os._exit(0)
    except BaseException:
        os._exit(1)


def wait_for_exit(child: int) -> int:
    """Return the exit code of a process, negative if a signal ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_halfway(plan: ReshardPlan, destination: Path, units: int = 1) -> None:
    """Execute a plan in a process that kills itself when half of the bytes are copied and so many units are safe."""
    marker = destination.with_name(destination.name + ".partial") / MARKER

    def die_if_reached(done: int, total: int, name: str) -> None:
        if done > total // 2 and read_journal(marker).units >= units:
            os.kill(os.getpid(), signal.SIGKILL)

    def run() -> None:
        Journal.record = record_synchronously  # type: ignore[method-assign]
        execute_reshard(plan, destination, ReshardOptions(die_if_reached, max_memory=SMALL, journal_interval=0))

    assert wait_for_exit(fork(run)) == -signal.SIGKILL
