"""Ranks on this machine: a rank that dies or hangs ends the others and is named, and none is left."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from plans.errors import WorkerError
from runtime.processes.launch import launch
from tests.waiting import HANG_TIMEOUT, is_running, wait_until


def test_a_worker_that_fails_is_named_with_its_last_lines_and_the_others_end(tmp_path: Path) -> None:
    body = "if rank == '1': print('the disk is full', file=sys.stderr); sys.exit(3)"
    with pytest.raises(WorkerError, match="rank 1 exited with 3: the disk is full") as caught:
        launch(2, script(tmp_path, body), timeout=HANG_TIMEOUT)
    assert caught.value.data["rank"] == 1
    assert caught.value.data["lines"] == ["the disk is full"]
    assert "the disk is full" not in caught.value.hint
    assert_none_is_left(tmp_path, 2)


def test_of_a_traceback_only_the_error_is_shown(tmp_path: Path) -> None:
    body = (
        "import atexit; atexit.register(print, 'W1 the end of a log', file=sys.stderr)\n"
        "if rank == '0': raise ValueError('no such expert')"
    )
    with pytest.raises(WorkerError, match=r"(?m)^rank 0 exited with 1: ValueError: no such expert$") as caught:
        launch(2, script(tmp_path, body), timeout=HANG_TIMEOUT)
    assert "Traceback" not in caught.value.message + caught.value.hint
    assert "Traceback (most recent call last):" in caught.value.data["lines"]
    assert_none_is_left(tmp_path, 2)


def test_a_worker_killed_by_a_signal_is_named(tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match="rank 0 was killed by signal 9: no output"):
        launch(2, script(tmp_path, "if rank == '0': os.kill(os.getpid(), 9)"), timeout=HANG_TIMEOUT)
    assert_none_is_left(tmp_path, 2)


def test_workers_that_hang_are_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds() -> float:
        """Let the timeout pass when both workers have printed their lines."""
        return 2.5 if len(list(tmp_path.glob("hanging-*"))) == 2 else 0.0

    monkeypatch.setattr("runtime.processes.launch.time", SimpleNamespace(monotonic=seconds, sleep=time.sleep))
    body = (
        "print('waiting for', rank, file=sys.stderr, flush=True)\n"
        f"open(os.path.join({str(tmp_path)!r}, 'hanging-' + rank), 'w')"
    )
    with pytest.raises(WorkerError, match=r"did not finish within 2 s; .* rank 1: waiting for 1") as caught:
        launch(2, script(tmp_path, body), timeout=2)
    assert caught.value.data["lines"] == {0: ["waiting for 0"], 1: ["waiting for 1"]}
    assert_none_is_left(tmp_path, 2)


def test_launching_from_a_thread_works(tmp_path: Path) -> None:
    failures: list[BaseException] = []

    def run() -> None:
        try:
            launch(1, script(tmp_path, "sys.exit(0)"), timeout=HANG_TIMEOUT)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(HANG_TIMEOUT)
    assert not thread.is_alive()
    assert failures == []
    assert_none_is_left(tmp_path, 1)


def test_workers_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    code = (
        "import os, sys; from runtime.processes.launch import launch\n"
        "launch(2, [sys.executable, '-P', '-c', sys.argv[1], str(os.getpid()), sys.argv[2]], timeout=600)"
    )
    child = (
        "import os, signal, sys; from pathlib import Path; from runtime.processes.started import die_with_parent\n"
        "die_with_parent(int(sys.argv[1]))\n"
        "Path(sys.argv[2], f'pid-{os.getpid()}').touch(); signal.pause()"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, child, str(tmp_path)])
    try:
        wait_until(lambda: len(list(tmp_path.glob("pid-*"))) == 2, parent)
    finally:
        parent.kill()
        parent.wait()
    assert_none_is_left(tmp_path, 2)


def script(folder: Path, body: str) -> list[str]:
    """Return the command of a worker that notes its process, waits for the others' notes, runs a body and hangs."""
    code = (
        "import os, signal, sys, time; rank = os.environ['RANK']\n"
        f"open(os.path.join({str(folder)!r}, f'pid-{{os.getpid()}}'), 'w')\n"
        f"while len(os.listdir({str(folder)!r})) < int(os.environ['WORLD_SIZE']): time.sleep(0.01)\n"
        f"{body}\n"
        "signal.pause()"
    )
    return [sys.executable, "-P", "-S", "-c", code]


def assert_none_is_left(folder: Path, world_size: int) -> None:
    processes = [int(path.name.removeprefix("pid-")) for path in folder.glob("pid-*")]
    assert len(processes) == world_size
    wait_until(lambda: not any(is_running(process) for process in processes))
