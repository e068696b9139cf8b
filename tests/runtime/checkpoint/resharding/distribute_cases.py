"""What the ranks of a reshard by several processes do, here as functions of pools and processes of our own."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch.distributed as dist

from plans.errors import MigratorError
from runtime.checkpoint.copying.journal import read_journal
from runtime.checkpoint.files.file_names import MARKER
from runtime.checkpoint.resharding.distribute import execute_distributed_reshard
from runtime.checkpoint.resharding.execute import ReshardOptions
from runtime.checkpoint.resharding.output_files import ReshardTarget
from runtime.checkpoint.resharding.plan import plan_reshard
from runtime.processes.group import process_group

SMALL = 2**20
"""So little memory that even a tiny checkpoint takes many units of work."""

STOPPED, KILLED = "stopped", "killed"


def reshard(source: Path, target: ReshardTarget, destination: Path) -> tuple[int, int] | None:
    """Reshard as one of the ranks; return the bytes read and written, on the first."""
    result = execute_distributed_reshard(
        plan_reshard(source, target=target), destination, ReshardOptions(max_memory=SMALL)
    )
    return (result.bytes_read, result.bytes_written) if result else None


def reshard_differently(source: Path, targets: Sequence[ReshardTarget], destination: Path) -> None:
    """Reshard with ranks that do not want the same."""
    reshard(source, targets[dist.get_rank()], destination)


def take_part(source: Path, target: ReshardTarget, destination: Path, fate: Mapping[int, str], timeout: float) -> None:
    """Be a rank that torchrun, or a test, has started, and meet one's fate once something of one's share is safe."""
    rank = int(os.environ["RANK"])
    journal = destination.with_name(destination.name + ".partial") / (f"{MARKER}-{rank:05d}" if rank else MARKER)

    def meet(done: int, total: int, name: str) -> None:
        if rank in fate and done > total // 2:
            _wait_for(journal)
            os.kill(os.getpid(), {STOPPED: signal.SIGSTOP, KILLED: signal.SIGKILL}[fate[rank]])

    options = ReshardOptions(meet, print, SMALL, journal_interval=0)
    with process_group(timeout):
        execute_distributed_reshard(plan_reshard(source, target=target), destination, options)


def _wait_for(journal: Path) -> None:
    deadline = time.monotonic() + 30
    while not read_journal(journal).units:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def forked(log: Path, *arguments: object) -> None:
    """Take part in a forked process; what goes wrong is written down, and the process ends."""
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
