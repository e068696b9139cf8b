"""Child processes that prove classes: with the tree on their path, limited in time and memory, replaced if lost.

They run code of the tree, which may hang, crash or fill the memory; that costs the mode in which it happens and nothing
else. Their environment carries no tokens, so that the code finds none there. Imports no torch.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

from plans.errors import WorkerError
from plans.mesh import Mode
from runtime.proving.sizes import Sizes
from runtime.proving.task import ModeResult, ProofTask

__all__ = ["ChildSettings", "build_environment", "prove_tasks"]

_SECRET = re.compile(r"AWS_.*|.*(TOKEN|KEY|SECRET|PASSWORD|CREDENTIALS?)", re.IGNORECASE)
_OWN_PACKAGES = Path(__file__).parents[2]
_ENTRY_POINT = "runtime.proving.process"
_LAST_BYTES = 20_000
_STARTUP_TIMEOUT = 600.0
"""Seconds in which a child must have imported torch and transformers."""

Report = Callable[[ProofTask, ModeResult], None]


@dataclass(frozen=True)
class ChildSettings:
    """What all children of a run have in common.

    Args:
        root: the folder to import the tree's code from, None for the installed packages.
        sizes: the sizes of tiny models.
        timeout: seconds that the making of a class's model may take, and then each mode.
        memory: bytes that a child may allocate, None for no limit.
        count: how many children work at once.
    """

    root: Path | None
    sizes: Sizes
    timeout: float = 300.0
    memory: int | None = None
    count: int = 2


def prove_tasks(tasks: Sequence[ProofTask], settings: ChildSettings, report: Report) -> str:
    """Prove classes in child processes, and report every mode's result as it comes.

    Args:
        tasks: the classes; each stays on one child.
        settings: the tree and the limits.
        report: called with each result.

    Returns:
        The version of transformers that the children imported.

    Raises:
        WorkerError: the tree's own transformers, or what it needs, cannot be imported.
    """
    with tempfile.TemporaryDirectory(prefix="migrator-") as folder:
        run = _Run(settings, report, Path(folder), deque(tasks))
        try:
            run.work()
        finally:
            run.close()
    return run.version


def build_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a child: without tokens, keys and secrets, GPUs and the hub."""
    kept = {name: value for name, value in environment.items() if not _SECRET.fullmatch(name)}
    return kept | {
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONPATH": str(_OWN_PACKAGES),
        "TRANSFORMERS_VERBOSITY": "error",
    }


@dataclass
class _Child:
    """A child process.

    Args:
        process: the process, the leader of a session of its own.
        pipe: the pipe to it.
        log: the file that its output goes to.
        deadline: when it must have sent its next message.
        task: the class that it works on.
        modes: the modes of that class that it has not answered for.
        is_ready: whether it has started up.
        has_model: whether it has made the class's model.
    """

    process: subprocess.Popen[bytes]
    pipe: Connection
    log: Path
    deadline: float
    task: ProofTask | None = None
    modes: deque[Mode] = field(default_factory=deque)
    is_ready: bool = False
    has_model: bool = False

    def kill(self) -> int:
        """End the process and all that it started; return its exit code."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.pipe.close()
        return self.process.wait()

    def read_last_line(self) -> str:
        """Return the last line that it printed."""
        data = self.log.read_bytes()[-_LAST_BYTES:]
        lines = [line.strip() for line in data.decode("utf-8", "replace").splitlines() if line.strip()]
        return lines[-1] if lines else "no output"


@dataclass
class _Run:
    """The children of a run, and the classes that wait for one."""

    settings: ChildSettings
    report: Report
    folder: Path
    waiting: deque[ProofTask]
    children: list[_Child] = field(default_factory=list)
    version: str = ""

    def work(self) -> None:
        """Prove all classes."""
        while self.waiting or any(child.task for child in self.children):
            while len(self.children) < min(self.settings.count, len(self.waiting) + self._count_busy()):
                self.children.append(self._start())
            for child in self.children:
                if child.is_ready and child.task is None and self.waiting:
                    self._give(child, self.waiting.popleft())
            pipes = {child.pipe: child for child in self.children}
            nearest = min(child.deadline for child in self.children if child.task or not child.is_ready)
            for pipe in wait(list(pipes), max(0.0, nearest - time.monotonic())):
                self._read(pipes[pipe])  # type: ignore[index]
            for child in list(self.children):
                if (child.task or not child.is_ready) and time.monotonic() > child.deadline:
                    limit = self.settings.timeout if child.is_ready else _STARTUP_TIMEOUT
                    self._lose(child, f"took longer than {limit:g} s")

    def close(self) -> None:
        """End all children."""
        for child in self.children:
            child.kill()

    def _count_busy(self) -> int:
        return sum(child.task is not None for child in self.children)

    def _start(self) -> _Child:
        ours, theirs = Pipe()
        log = self.folder / f"{time.monotonic_ns()}.log"
        command = [sys.executable, "-P", "-W", "ignore", "-m", _ENTRY_POINT]
        with theirs, log.open("wb") as output:
            process = subprocess.Popen(
                [*command, str(os.getpid()), str(theirs.fileno())],
                cwd=self.folder,
                env=build_environment(os.environ),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=[theirs.fileno()],
            )
        child = _Child(process, ours, log, time.monotonic() + _STARTUP_TIMEOUT)
        root = self.settings.root
        self._send(
            child,
            {
                "root": None if root is None else str(root.resolve()),
                "sizes": self.settings.sizes.to_json(),
                "timeout": self.settings.timeout,
                "memory": self.settings.memory,
            },
        )
        return child

    def _give(self, child: _Child, task: ProofTask) -> None:
        child.task, child.modes, child.has_model = task, deque(task.modes), False
        child.deadline = time.monotonic() + self.settings.timeout
        self._send(child, task.to_json())

    def _send(self, child: _Child, value: object) -> None:
        with suppress(OSError):  # it has ended, which the next read tells
            child.pipe.send_bytes(json.dumps(value).encode())

    def _read(self, child: _Child) -> None:
        try:
            message: dict[str, Any] = json.loads(child.pipe.recv_bytes())
        except (EOFError, OSError):
            self._lose(child, None)
            return
        child.deadline = time.monotonic() + self.settings.timeout
        if "failed" in message:
            raise self._build_startup_error(message["failed"])
        if "ready" in message:
            child.is_ready, self.version = True, message["ready"]
            return
        if "built" in message:
            child.has_model = True
            return
        assert child.task is not None
        self.report(child.task, ModeResult.from_json(message))
        child.modes.popleft()
        if not child.modes:
            child.task = None

    def _lose(self, child: _Child, why: str | None) -> None:
        """Report the mode in which a child was lost, and let another child do the rest of its class.

        A child that was lost before it had a model would be lost again, in every mode.
        """
        code = child.kill()
        self.children.remove(child)
        reason = why or (f"was killed by signal {-code}" if code < 0 else f"exited with {code}")
        if not child.is_ready:
            raise self._build_startup_error(f"{reason}: {child.read_last_line()}")
        if child.task is None:
            return
        said = "" if why else f": {child.read_last_line()}"
        for _ in range(1 if child.has_model else len(child.modes)):
            self.report(child.task, ModeResult(child.modes.popleft(), "failed", f"its process {reason}{said}"))
        if child.modes:
            self.waiting.appendleft(replace(child.task, modes=tuple(child.modes)))

    def _build_startup_error(self, reason: str) -> WorkerError:
        where = self.settings.root or "the installed packages"
        return WorkerError(
            f"transformers cannot be imported from {where}: {reason}",
            hint="import it in a Python of its own, and mend what is reported there",
            path=str(where),
        )
