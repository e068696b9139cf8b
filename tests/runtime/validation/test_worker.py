"""Validation with workers of our own: the answer comes back, whatever happens to one of them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from plans.errors import IncompleteError, UsageError, WorkerError
from plans.mesh import Mesh
from runtime.processes.launch import launch
from runtime.validation.request import ValidationRequest
from runtime.validation.results import PARTS
from runtime.validation.worker import run_validation
from tests.waiting import HANG_TIMEOUT

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
    assert caught.value.hint.startswith("copy the model's config.json there")


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


def test_a_worker_that_fails_says_why_and_leaves_with_1() -> None:
    command = [sys.executable, "-P", "-m", "runtime.validation.process", str(os.getpid()), "no request", "3"]
    done = subprocess.run(command, capture_output=True, check=False, timeout=HANG_TIMEOUT)
    assert done.returncode == 1
    assert "JSONDecodeError" in done.stderr.decode().splitlines()[-1]
