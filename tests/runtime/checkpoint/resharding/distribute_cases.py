"""What the ranks of a distributed reshard do: functions for a pool of ranks, and for processes of our own."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from plans.errors import MigratorError
from runtime.checkpoint.copying.journal import Journal, read_journal
from runtime.checkpoint.files.file_names import MARKER
from runtime.checkpoint.resharding.distribute import execute_distributed_reshard
from runtime.checkpoint.resharding.execute import ReshardOptions
from runtime.checkpoint.resharding.output_files import ReshardTarget
from runtime.checkpoint.resharding.plan import plan_reshard
from runtime.processes.group import process_group
from tests.runtime.checkpoint.resharding.killed_runs import SMALL, record_synchronously
from tests.waiting import HANG_TIMEOUT, wait_until

STOPPED, KILLED = "stopped", "killed"


def reshard(source: Path, target: ReshardTarget, destination: Path) -> tuple[int, int] | None:
    """Reshard as one of the ranks; return the bytes read and written on rank 0."""
    result = execute_distributed_reshard(
        plan_reshard(source, target=target), destination, ReshardOptions(max_memory=SMALL)
    )
    return (result.bytes_read, result.bytes_written) if result else None


def reshard_differently(source: Path, targets: Sequence[ReshardTarget], destination: Path) -> None:
    """Reshard with a different target on each rank."""
    reshard(source, targets[dist.get_rank()], destination)


def take_part(source: Path, target: ReshardTarget, destination: Path, fates: Mapping[int, str]) -> None:
    """Reshard as a rank that torchrun or a test has started, and end as `fates` says once half of the share is done.

    If a rank is to be stopped, the others wait until the test has seen it stop, and only then limit their patience.
    """
    rank = int(os.environ["RANK"])
    journal = destination.with_name(destination.name + ".partial") / (f"{MARKER}-{rank:05d}" if rank else MARKER)

    def end(done: int, total: int, name: str) -> None:
        if done <= total // 2 or not read_journal(journal).units:
            return
        if rank in fates:
            os.kill(os.getpid(), {STOPPED: signal.SIGSTOP, KILLED: signal.SIGKILL}[fates[rank]])
        elif STOPPED in fates.values():
            wait_until(stopped_file(destination).exists)
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=3), dist.group.WORLD)

    Journal.record = record_synchronously  # type: ignore[method-assign]
    options = ReshardOptions(end, print, SMALL, journal_interval=0)
    with process_group(HANG_TIMEOUT):
        execute_distributed_reshard(plan_reshard(source, target=target), destination, options)


def stopped_file(destination: Path) -> Path:
    """Return the file by which a test tells the other ranks that one was stopped."""
    return destination.with_name("stopped")


def forked(log: Path, *arguments: object) -> None:
    """Take part in a forked process; write any error to the log, and end the process."""
    code = 0
    try:
        take_part(*arguments)  # type: ignore[arg-type]
    except MigratorError as error:
        log.write_text(json.dumps({"error": type(error).__name__, "message": error.message, "hint": error.hint}))
        code = 2
    except BaseException as error:
        log.write_text(json.dumps({"error": type(error).__name__, "message": str(error), "hint": ""}))
        code = 3
    sys.stdout.flush()
    os._exit(code)
