"""Validation with workers of our own: the answer comes back, whatever happens to one of them."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from plans.errors import IncompleteError, IndivisibleError, UsageError, WorkerError
from plans.mesh import Mesh
from runtime import run_on_ranks
from runtime.processes.launch import launch
from runtime.styles import STYLES
from runtime.validation import worker
from runtime.validation.request import ValidationRequest, resolve_mesh
from runtime.validation.results import PARTS
from runtime.validation.validate import validate
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
    folder = rank_folder("llama", 2)
    with pytest.raises(
        UsageError,
        match=r"(?s)`tp=2`, not `tp=4`.*hint: leave the mesh out, pass `tp=2`, or reshard the checkpoint",
    ):
        run_validation(ValidationRequest(folder, Mesh(tp=4)))
    assert resolve_mesh(folder, {}, None) == resolve_mesh(folder, {"tp": 2}, None) == (Mesh(tp=2), "tp")


def test_no_worker_is_started_for_more_ranks_than_a_machine_can_run(
    hub_folder: HubFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.validation.worker.launch", None)
    with pytest.raises(
        UsageError,
        match=r"(?s)100000 ranks are too many for this machine.*hint: use `ranks=threads`, a smaller mesh",
    ):
        run_validation(ValidationRequest(hub_folder("llama"), Mesh(tp=100_000), ranks="processes"))


@pytest.mark.parametrize(
    ("ranks", "device", "world_size", "gpus", "chosen"),
    [
        ("auto", "cpu", 2, 0, "processes"),
        ("auto", "cpu", 4, 8, "threads"),
        ("auto", "auto", 4, 0, "threads"),
        ("auto", "auto", 8, 8, "processes"),
        ("auto", "cuda", 16, 8, "threads"),
        ("auto", "cuda", 2, 1, "threads"),
        ("processes", "cpu", 16, 0, "processes"),
        ("threads", "cuda", 2, 8, "threads"),
    ],
)
def test_ranks_are_processes_where_each_has_a_place(
    ranks: Any, device: Any, world_size: int, gpus: int, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "count_cpus", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    request = ValidationRequest(Path("anything"), Mesh(tp=world_size), device=device, ranks=ranks)
    assert worker.choose_ranks(request) == chosen


def test_a_torch_that_mixes_threads_up_is_not_asked_to_run_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch._C._distributed_c10d, "_set_thread_isolation_mode")
    monkeypatch.setattr(worker, "count_cpus", lambda: 2)
    assert worker.choose_ranks(ValidationRequest(Path("anything"), Mesh(tp=64))) == "processes"
    with pytest.raises(UsageError, match=f"torch {re.escape(torch.__version__)} cannot run ranks as threads"):
        worker.choose_ranks(ValidationRequest(Path("anything"), Mesh(tp=2), ranks="threads"))


def test_ranks_of_torchrun_are_no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        UsageError, match=r"(?s)torchrun starts ranks as processes.*hint: leave `ranks` out, or run without torchrun"
    ):
        worker.validate_as_rank(ValidationRequest(Path("anything"), Mesh(tp=2), ranks="threads"))


def test_ranks_on_gpus_that_are_not_there_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(worker.faulthandler, "dump_traceback_later", lambda *arguments, **named: None)
    with pytest.raises(UsageError, match=r"(?s)there is no GPU for the ranks.*hint: use `device=cpu`"):
        worker._validate_on_threads(ValidationRequest(Path("anything"), Mesh(tp=2), device="cuda", ranks="threads"))


def test_ranks_as_threads_find_what_processes_do(hub_folder: HubFolder) -> None:
    """Twice as many ranks as processors, in every part, with the errors of ranks that all fail alike."""
    mesh = Mesh(tp=2, ep=4, fsdp=2)
    request = ValidationRequest(hub_folder("qwen3_moe"), mesh, "tp_ep", timeout=HANG_TIMEOUT, ranks="threads")
    result = run_validation(request)
    assert (result.verdict, result.ranks, result.world_size) == ("proven", "threads", 4)
    assert tuple(result.checks) == PARTS
    with pytest.raises(IndivisibleError, match=r"^tp=3 does not divide the intermediate size of"):
        run_validation(replace(request, mesh=Mesh(tp=3), mode="tp"))


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


def fail_alone(site: Any, run: Any, *args: Any, **kwargs: Any) -> Any:
    if dist.get_rank() == 1:
        raise IndexError("no such expert")
    return STYLES.styles["moe_tp_experts"].around(site, run, *args, **kwargs)


def test_a_thread_whose_forward_fails_alone_ends_the_run_at_once(rank_folder: RankFolder) -> None:
    styles = STYLES.register(replace(STYLES.styles["moe_tp_experts"], around=fail_alone))
    request = ValidationRequest(rank_folder("qwen3_moe", 2), Mesh(tp=2))
    with pytest.raises(WorkerError, match=r"^rank 1: IndexError: no such expert"):
        run_on_ranks(lambda: validate(request, styles), 2, timeout=HANG_TIMEOUT)


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
