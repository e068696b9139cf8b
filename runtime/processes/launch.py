"""Worker processes on this machine, with the environment of torchrun, a deadline and no orphans.

torch's own launchers have no deadline, keep a process's signal handlers and leave log files open, so processes are
started here; what a worker sees is the same.
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
"""Seconds between two looks at the workers."""
_LAST_LINES = 20
_ERROR = re.compile(r"[\w.]*(Error|Exception|Interrupt)\b")


@dataclass(frozen=True)
class _RankProcess:
    """A started rank, and the descriptor of the file that it writes to."""

    rank: int
    process: subprocess.Popen[bytes]
    log: int

    def read_last_lines(self) -> list[str]:
        # Read in place: the worker has the same position in the file, and writes on from there.
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
    """Run a command as `world_size` ranks of one process group and wait for all of them.

    The command finds the variables that torchrun sets, so the same command also runs under torchrun. What it
    prints goes to log files; the last lines of a rank that fails become part of the error. The files have no names, so
    that nothing of them is left however this process ends.

    Args:
        world_size: processes to start.
        command: program and arguments, the same for every rank.
        timeout: seconds after which all are killed.
        environment: variables to add for every rank.
        pass_fds: descriptors that every rank inherits, under the same numbers.

    Raises:
        WorkerError: a rank failed, died or was too slow; all others have been ended.
    """
    # This process holds the store of the rendezvous, so no port is chosen that another process might take.
    store = TCPStore("127.0.0.1", 0, None, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout))
    shared = _shared_environment(world_size, store.port) | dict(environment or {})
    with ExitStack() as running:
        workers = [running.enter_context(_start_rank(rank, command, shared, pass_fds)) for rank in range(world_size)]
        _wait_for_workers(workers, timeout)


@contextmanager
def _start_rank(
    rank: int, command: Sequence[str], shared: Mapping[str, str], pass_fds: Sequence[int]
) -> Iterator[_RankProcess]:
    """Start one rank in a session of its own, and end whatever of it still runs on the way out."""
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
    # A rank that died by a signal brings others down, which may fail before the next look.
    first = min(failed, key=lambda worker: worker.process.returncode > 0)
    code, last = first.process.returncode, first.read_last_lines()
    how = f"was killed by signal {-code}" if code < 0 else f"exited with {code}"
    raise WorkerError(
        f"rank {first.rank} {how}: {_find_error_line(last)}",
        hint="run it under torchrun to see all that the ranks write",
        rank=first.rank,
        exitcode=code,
        lines=last,
    )


def _find_error_line(lines: Sequence[str]) -> str:
    """Return the line that names an error, else the last one."""
    named = [line for line in lines if _ERROR.match(line)]
    return [*lines, *named][-1] if lines else "it wrote nothing"


def _build_timeout_error(workers: Sequence[_RankProcess], timeout: float) -> WorkerError:
    lines = {worker.rank: worker.read_last_lines() for worker in workers if worker.process.returncode is None}
    said = "; ".join(f"rank {rank}: {last[-1] if last else 'nothing'}" for rank, last in lines.items())
    return WorkerError(
        f"{len(lines)} workers were not done after {timeout:g} s; what each wrote last: {said}",
        hint="allow more time, or look for the rank that hangs",
        timeout=timeout,
        lines=lines,
    )
