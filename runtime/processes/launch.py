"""Worker processes on this machine, with the environment of torchrun, a deadline and no orphans.

torch's own launchers have no deadline, replace the process's signal handlers and leave log files open. Workers started
here see the same environment.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from plans.errors import WorkerError

__all__ = ["launch"]

_POLL_SECONDS = 0.05
"""Seconds between two polls of the workers."""
_LAST_LINES = 20
_ERROR = re.compile(r"[\w.]*(Error|Exception|Interrupt)\b")


@dataclass(frozen=True)
class _RankProcess:
    """A started rank, with the descriptor of the file that its output goes to."""

    rank: int
    process: subprocess.Popen[bytes]
    log: int

    def read_last_lines(self) -> list[str]:
        # pread keeps the file position, which the worker shares and goes on writing from.
        lines = os.pread(self.log, os.fstat(self.log).st_size, 0).decode("utf-8", "replace").splitlines()
        return [line.strip() for line in lines if line.strip()][-_LAST_LINES:]


def launch(
    world_size: int,
    command: Sequence[str],
    *,
    timeout: float,
    environment: Mapping[str, str] | None = None,
    pass_fds: Sequence[int] = (),
) -> None:
    """Run a command as `world_size` ranks of one process group, and wait for all of them.

    The environment has the variables that torchrun sets, so the same command also runs under torchrun. Output goes to
    log files, and the last lines of a failed rank become part of the error. The files have no names, so nothing of
    them is left behind, however this process ends.

    Args:
        world_size: the number of processes to start.
        command: the program and its arguments, the same for every rank.
        timeout: seconds after which all ranks are killed.
        environment: additional variables for every rank.
        pass_fds: file descriptors that every rank inherits, under the same numbers.

    Raises:
        WorkerError: a rank failed, died or took too long; all other ranks have been killed.
    """
    # This process holds the rendezvous store, so the port cannot be taken by another process meanwhile.
    store = TCPStore("127.0.0.1", 0, None, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout))
    shared = _shared_environment(world_size, store.port) | dict(environment or {})
    with ExitStack() as running:
        workers = [running.enter_context(_start_rank(rank, command, shared, pass_fds)) for rank in range(world_size)]
        _wait_for_workers(workers, timeout)


@contextmanager
def _start_rank(
    rank: int, command: Sequence[str], shared: Mapping[str, str], pass_fds: Sequence[int]
) -> Iterator[_RankProcess]:
    """Start one rank in a session of its own, and kill that session on the way out if it still runs."""
    environment = {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
    with (
        tempfile.TemporaryFile() as output,
        subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=pass_fds,
        ) as process,
    ):
        try:
            yield _RankProcess(rank, process, output.fileno())
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def _shared_environment(world_size: int, port: int) -> dict[str, str]:
    return {
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": uuid.uuid4().hex,
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }


def _wait_for_workers(workers: Sequence[_RankProcess], timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while None in [worker.process.poll() for worker in workers]:
        _raise_failure(workers)
        if time.monotonic() > deadline:
            raise _build_timeout_error(workers, timeout)
        time.sleep(_POLL_SECONDS)
    _raise_failure(workers)


def _raise_failure(workers: Sequence[_RankProcess]) -> None:
    failed = [worker for worker in workers if worker.process.returncode]
    if not failed:
        return
    # A rank killed by a signal makes others fail, perhaps before the next poll, so it comes first.
    first = min(failed, key=lambda worker: worker.process.returncode > 0)
    code, last = first.process.returncode, first.read_last_lines()
    how = f"was killed by signal {-code}" if code < 0 else f"exited with {code}"
    raise WorkerError(
        f"rank {first.rank} {how}: {_find_error_line(last)}",
        hint="run it under torchrun to see all output of the ranks",
        rank=first.rank,
        exitcode=code,
        lines=last,
    )


def _find_error_line(lines: Sequence[str]) -> str:
    """Return the last line that names an error, else the last line."""
    named = [line for line in lines if _ERROR.match(line)]
    return [*lines, *named][-1] if lines else "no output"


def _build_timeout_error(workers: Sequence[_RankProcess], timeout: float) -> WorkerError:
    lines = {worker.rank: worker.read_last_lines() for worker in workers if worker.process.returncode is None}
    outputs = "; ".join(f"rank {rank}: {last[-1] if last else 'no output'}" for rank, last in lines.items())
    return WorkerError(
        f"{len(lines)} workers did not finish within {timeout:g} s; their last output: {outputs}",
        hint="allow more time, or find the rank that hangs",
        timeout=timeout,
        lines=lines,
    )
