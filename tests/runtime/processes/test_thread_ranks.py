"""Thread ranks compute what gloo's processes do, and a run that fails says who waited for what and leaves nothing."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.testing import assert_close

from plans.errors import MigratorError, PlanError, UsageError, WorkerError
from plans.mesh import Mesh
from runtime import run_on_ranks
from tests.runtime.parallel import parity_cases
from tests.runtime.processes import collective_cases
from tests.runtime.rank_pool import RankPool

CASES: tuple[Callable[[], Any], ...] = (
    collective_cases.reduced,
    collective_cases.moved,
    collective_cases.passed_on,
    collective_cases.in_groups,
    collective_cases.of_dtensors,
    collective_cases.of_fsdp,
)
# torch 2.13 has new names for collectives, which older ones lack.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.distributed:FutureWarning")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_threads_compute_what_processes_do(case: Callable[[], Any], two_ranks: RankPool, four_ranks: RankPool) -> None:
    for size, processes in ((2, two_ranks), (4, four_ranks)):
        assert_close(run_on_ranks(case, size), processes.run(case), rtol=1e-12, atol=1e-12)


def average() -> tuple[torch.Tensor, torch.Tensor]:
    whole, shard = collective_cases.own(4), torch.empty(2, dtype=torch.float64)
    dist.all_reduce(whole, dist.ReduceOp.AVG)
    dist.reduce_scatter_tensor(shard, collective_cases.own(8), dist.ReduceOp.AVG)
    return whole, shard


def test_averages_which_gloo_lacks() -> None:
    own = [torch.randn(4, generator=torch.Generator().manual_seed(rank + 1), dtype=torch.float64) for rank in range(4)]
    longer = [
        torch.randn(8, generator=torch.Generator().manual_seed(rank + 1), dtype=torch.float64) for rank in range(4)
    ]
    for rank, (whole, shard) in enumerate(run_on_ranks(average, 4)):
        assert_close(whole, torch.stack(own).mean(0))
        assert_close(shard, torch.stack(longer).mean(0)[2 * rank : 2 * rank + 2])


@pytest.mark.parametrize(
    ("mode", "mesh"),
    [
        ("tp", Mesh(tp=2)),
        ("tp", Mesh(tp=2, fsdp=2)),
        ("tp_ep", Mesh(tp=2, ep=4, fsdp=2)),
        ("sp", Mesh(tp=4)),
        ("sp_ep", Mesh(tp=2, ep=2, fsdp=2)),
    ],
    ids=str,
)
def test_a_model_on_threads_computes_what_the_unsharded_one_does(mode: Any, mesh: Mesh) -> None:
    name = "qwen3_moe"
    parity_cases.after_backward(name, (2, 16), "eager")
    for found in run_on_ranks(lambda: parity_cases.parity(name, mode, mesh), mesh):
        assert found.logits < 1e-5
        assert found.worst[1] < 1e-5, found.worst


def random_numbers() -> list[float]:
    """Draw numbers from torch's own generator, waiting for other ranks in between, in a default dtype of one's own."""
    torch.manual_seed(dist.get_rank() % 2)
    torch.set_default_dtype(torch.float64 if dist.get_rank() == 1 else torch.float32)
    drawn = []
    for _ in range(3):
        dist.barrier()
        drawn.append(torch.rand(1))
    assert all(one.dtype == torch.get_default_dtype() for one in drawn)
    return [float(one) for one in drawn]


def test_each_rank_has_random_generators_and_a_default_dtype_of_its_own() -> None:
    before = torch.get_rng_state(), torch.get_default_dtype()
    first, second, third = run_on_ranks(random_numbers, 3)
    assert first == third != second
    assert torch.equal(torch.get_rng_state(), before[0])
    assert torch.get_default_dtype() == before[1]


def test_repeated_runs_agree_in_every_bit() -> None:
    first, *others = (run_on_ranks(collective_cases.of_fsdp, 4) for _ in range(4))
    for other in others:
        assert all(
            torch.equal(a, b) for one, two in zip(first, other, strict=True) for a, b in zip(one, two, strict=True)
        )


def fail(run: Callable[[], object], size: int = 4, timeout: float = 60) -> MigratorError:
    """Return the error of a run; afterwards no thread is left, and torch's world of processes is back."""
    original, threads = distributed_c10d._world, threading.active_count()
    started = time.monotonic()
    with pytest.raises(MigratorError) as raised:
        run_on_ranks(run, size, timeout=timeout)
    assert time.monotonic() - started < timeout + 20
    assert threading.active_count() == threads
    assert distributed_c10d._world is original
    assert not dist.is_initialized()
    assert run_on_ranks(dist.get_rank, 3) == [0, 1, 2]
    return raised.value


def test_an_error_of_one_rank_ends_the_run_with_its_number() -> None:
    def run() -> None:
        if dist.get_rank() == 2:
            raise ValueError("no such layer")
        dist.barrier()

    error = fail(run)
    assert isinstance(error, WorkerError)
    assert error.message == "rank 2: ValueError: no such layer"
    assert isinstance(error.__cause__, ValueError)


def test_an_error_for_the_user_keeps_its_kind_and_hint() -> None:
    def run() -> None:
        if dist.get_rank() == 1:
            raise PlanError("no plan", hint="write one", key="layers")
        dist.barrier()

    error = fail(run)
    assert isinstance(error, PlanError)
    assert (error.message, error.hint, error.data) == ("rank 1: no plan", "write one", {"key": "layers"})


def leave_early() -> None:
    if dist.get_rank() > 0:
        dist.barrier()


def cross() -> None:
    """Take two groups in another order on each rank, which two processes would never return from."""
    groups = [dist.new_group([0, 1]), dist.new_group([0, 1])]
    for group in groups if dist.get_rank() == 0 else reversed(groups):
        dist.all_reduce(torch.ones(1), group=group)


def receive_nothing() -> None:
    if dist.get_rank() == 0:
        dist.recv(torch.ones(2), 1, tag=5)


@pytest.mark.parametrize(
    ("run", "size", "words"),
    [
        (leave_early, 3, ["barrier() with rank 0;", "rank 0: finished"]),
        (
            cross,
            2,
            ["rank 0: all_reduce(SUM, float32[1]) with rank 1", "rank 1: all_reduce(SUM, float32[1]) with rank 0"],
        ),
        (receive_nothing, 2, ["rank 0: recv of rank 1 with tag 5", "rank 1: finished"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_ranks_that_wait_for_each_other_are_told_at_once(run: Callable[[], None], size: int, words: list[str]) -> None:
    started = time.monotonic()
    error = fail(run, size, timeout=600)
    assert time.monotonic() - started < 120
    assert "wait for each other" in error.message
    assert all(text in error.message for text in words), error.message


def other_shape() -> None:
    dist.all_reduce(torch.ones(2 + (dist.get_rank() == 1)))


def other_collective() -> None:
    dist.barrier() if dist.get_rank() == 1 else dist.broadcast(torch.ones(2), 0)


def other_reduction() -> None:
    dist.all_reduce(torch.ones(2), dist.ReduceOp.MAX if dist.get_rank() == 1 else dist.ReduceOp.SUM)


@pytest.mark.parametrize("run", [other_shape, other_collective, other_reduction], ids=lambda run: run.__name__)
def test_ranks_that_disagree_about_a_collective_are_named(run: Callable[[], None]) -> None:
    error = fail(run, 3)
    assert error.message.startswith("ranks of one group disagree: ranks 0, 2: ")
    assert "; rank 1: " in error.message


def test_a_rank_that_does_not_come_is_named_with_its_line() -> None:
    def run() -> None:
        is_late = dist.get_rank() == 1
        while is_late:
            time.sleep(0.01)
        dist.barrier()

    error = fail(run, timeout=1.5)
    assert "longer than 1.5 s" in error.message
    assert "rank 0: barrier() with ranks" in error.message
    assert "rank 1: in run, " in error.message
    assert "test_thread_ranks.py:" in error.message


def test_a_process_with_a_group_of_its_own_is_refused(tmp_path: Any) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        with pytest.raises(UsageError, match="has a process group already"):
            run_on_ranks(dist.get_rank, 2)
    finally:
        dist.destroy_process_group()


def test_more_ranks_than_threads_can_be_are_refused() -> None:
    with pytest.raises(UsageError, match=r"(?s)100,000 ranks are too many for threads.*hint: use a smaller mesh"):
        run_on_ranks(lambda: None, Mesh(tp=2, replicate=50_000))


def test_a_run_inside_a_run_is_refused() -> None:
    assert "process group already" in fail(lambda: run_on_ranks(dist.get_rank, 2), 2).message


def test_other_threads_keep_their_world() -> None:
    seen: list[bool] = []

    def run() -> None:
        if dist.get_rank() == 0:
            thread = threading.Thread(target=lambda: seen.append(dist.is_initialized()))
            thread.start()
            thread.join()
        dist.barrier()

    run_on_ranks(run, 2)
    assert seen == [False]
