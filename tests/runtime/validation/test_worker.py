"""Validation with workers of our own: the answer comes back, and a worker that dies or hangs takes none along."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from plans.errors import IncompleteError, UsageError, WorkerError
from plans.mesh import Mesh
from runtime.parallel.mismatch import Mismatch as Row
from runtime.processes.launch import launch
from runtime.processes.started import is_worker_process
from runtime.validation.request import ValidationRequest
from runtime.validation.results import PARTS, CheckResult, ValidationResult
from runtime.validation.worker import run_validation
from tests.waiting import HANG_TIMEOUT, is_running, wait_until

HubFolder = Callable[[str], Path]
RankFolder = Callable[[str, int], Path]


def test_a_validation_with_our_own_workers(
    hub_folder: HubFolder, rank_folder: RankFolder, capfd: pytest.CaptureFixture[str]
) -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    folder, reference = rank_folder("qwen3_moe", 2), hub_folder("qwen3_moe")
    capfd.readouterr()
    result = run_validation(ValidationRequest(folder, Mesh(tp=2), reference=reference, timeout=HANG_TIMEOUT))
    assert result.ok
    assert result.world_size == 2
    assert tuple(result.checks) == PARTS
    assert 0 < result.checks["forward"].numbers["max_abs_diff"] < 1e-5
    assert capfd.readouterr() == ("", "")
    assert {number: signal.getsignal(number) for number in before} == before


def test_an_error_inside_the_workers_comes_back_as_it_was(rank_folder: RankFolder, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(rank_folder("llama", 2), tmp_path / "ranks"))
    (folder / "config.json").unlink()
    with pytest.raises(IncompleteError, match=r"no config\.json") as caught:
        run_validation(ValidationRequest(folder, Mesh(tp=2), timeout=HANG_TIMEOUT))
    assert caught.value.hint == "name a folder that save_pretrained wrote"


def test_no_worker_is_started_for_a_folder_of_another_mesh(
    rank_folder: RankFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.validation.worker.launch", None)
    with pytest.raises(UsageError, match="`tp=2`, not `tp=4`"):
        run_validation(ValidationRequest(rank_folder("llama", 2), Mesh(tp=4)))


def test_no_worker_is_started_for_more_ranks_than_a_machine_can_run(
    hub_folder: HubFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.validation.worker.launch", None)
    with pytest.raises(UsageError, match="100000 ranks are too many for this machine"):
        run_validation(ValidationRequest(hub_folder("llama"), Mesh(tp=100_000)))


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


ONE_FAILS = """
import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from plans.mesh import Mesh
from runtime.styles import STYLES
from runtime.validation.validate import validate
from runtime.validation import run_on_all_ranks as attempt
from runtime.validation.request import ValidationRequest

def fail_alone(site, run, *args, **kwargs):
    if dist.get_rank() == 1:
        raise IndexError("no such expert")
    return real.around(site, run, *args, **kwargs)

dist.init_process_group("gloo")
attempt._EXIT_TIMEOUT = 1.0
real = STYLES.styles["moe_tp_experts"]
request = ValidationRequest(Path(sys.argv[1]), Mesh(tp=2), timeout=600)
try:
    validate(request, STYLES.register(replace(real, around=fail_alone)))
finally:
    if dist.get_rank() == 0:
        signal.pause()  # rank 0 fails when rank 1 is gone; however busy the machine, rank 1 ends first
"""


def test_a_rank_whose_forward_fails_alone_does_not_leave_the_others_waiting(rank_folder: RankFolder) -> None:
    command = [sys.executable, "-P", "-c", ONE_FAILS, str(rank_folder("qwen3_moe", 2))]
    with pytest.raises(WorkerError, match=r"rank 1 exited with 1: IndexError: no such expert"):
        launch(2, command, timeout=HANG_TIMEOUT)


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


def test_a_worker_whose_parent_is_gone_before_it_looks_does_nothing(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-S", "-c", ""])
    gone.wait()
    command = [sys.executable, "-P", "-m", "runtime.validation.process", str(gone.pid), "no request", ""]
    with (tmp_path / "answer.json").open("w+b") as answer:
        command[-1] = str(answer.fileno())
        done = subprocess.run(
            command, capture_output=True, check=False, timeout=HANG_TIMEOUT, pass_fds=[answer.fileno()]
        )
        assert (done.returncode, done.stdout, done.stderr, answer.read()) == (1, b"", b"", b"")


def test_a_worker_leaves_without_the_interpreters_own_ending() -> None:
    code = (
        "import atexit, sys; from runtime.processes.started import exit_now\n"
        "atexit.register(print, 'the interpreter ended')\n"
        "print('said'); print('told', file=sys.stderr); exit_now(3)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, check=False, timeout=HANG_TIMEOUT)
    assert (done.returncode, done.stdout, done.stderr) == (3, b"said\n", b"told\n")


def test_a_worker_that_fails_says_why_and_leaves_with_1() -> None:
    command = [sys.executable, "-P", "-m", "runtime.validation.process", str(os.getpid()), "no request", "3"]
    done = subprocess.run(command, capture_output=True, check=False, timeout=HANG_TIMEOUT)
    assert done.returncode == 1
    assert "JSONDecodeError" in done.stderr.decode().splitlines()[-1]


def test_being_a_worker_shows_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_worker_process()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("RANK", "0")
    assert is_worker_process()


WRONG = (Row("a", "b", "c", 1),)


def test_results_and_requests_survive_json() -> None:
    checks = {"structure": CheckResult(3, WRONG), "content": CheckResult(3, numbers={"copies": 4})}
    result = ValidationResult(2, checks, {"forward": "no"}, "cuda", {"loading": 1.5})
    assert ValidationResult.from_json(json.loads(json.dumps(result.to_json()))) == result
    request = ValidationRequest(Path("/one"), Mesh(tp=2, ep=2), "ep", Path("/two"), "cuda", seed=5)
    assert ValidationRequest.from_json(json.loads(json.dumps(request.to_json()))) == request


def test_what_is_not_finite_is_null_in_json() -> None:
    found = CheckResult(1, numbers={"max_abs_diff": float("inf"), "tolerance": 1e-5}).to_json()
    assert (found["max_abs_diff"], found["tolerance"]) == (None, 1e-5)


def test_json_has_every_part() -> None:
    found = ValidationResult(2, {}).to_json()
    assert [found[part]["ok"] for part in PARTS] == [None] * 5


@pytest.mark.parametrize("tolerance", [0.0, 1.0, -1.0, float("nan"), float("inf")])
def test_what_is_no_tolerance_is_refused(tolerance: float) -> None:
    with pytest.raises(UsageError, match="tolerance must be between 0 and 1"):
        ValidationRequest(Path("/one"), Mesh(tp=2), tolerance=tolerance)


def test_a_result_is_ok_only_when_all_was_looked_at_and_is_right() -> None:
    right = {part: CheckResult(3) for part in PARTS}
    assert ValidationResult(2, right).ok
    for part in PARTS:
        assert not ValidationResult(2, right | {part: CheckResult(3, WRONG)}).ok
        assert not ValidationResult(2, right | {part: CheckResult(0)}).ok
        without = {name: check for name, check in right.items() if name != part}
        # A model may have no text to write, but there is no proof without its outputs.
        assert ValidationResult(2, without).ok == (part in ("backward", "generation"))


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
