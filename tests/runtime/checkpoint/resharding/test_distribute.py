"""Several processes that reshard together write the bytes of one, whatever happens to one of them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import transformers

from plans.errors import DestinationError, MismatchError, UsageError
from plans.mesh import Mesh
from runtime.checkpoint.copying.journal import read_journal
from runtime.checkpoint.copying.slabs import select_rank_share
from runtime.checkpoint.files.file_names import MARKER
from runtime.checkpoint.resharding.execute import ReshardResult, execute_reshard
from runtime.checkpoint.resharding.output_files import ReshardTarget
from runtime.checkpoint.resharding.plan import ReshardPlan, plan_reshard
from runtime.tensor_map.strided_copy import covers
from tests.conftest import HubFolder
from tests.runtime.checkpoint.optimizer.test_optimizer import adamw, with_state
from tests.runtime.checkpoint.resharding import distribute_cases
from tests.runtime.rank_pool import RankPool
from tests.tiny_models import MODELS, tiny_model
from tests.waiting import HANG_TIMEOUT, wait_until

TARGETS = {
    "ranks": ReshardTarget("ranks", Mesh(tp=2)),
    "dcp": ReshardTarget("dcp", Mesh(tp=2, ep=4, fsdp=2), "tp_ep"),
    "hub": ReshardTarget("hf"),
}
Watched = Callable[..., dict[int, int]]
MIGRATOR = str(Path(sys.executable).with_name("migrator"))
TORCHRUN = str(Path(sys.executable).with_name("torchrun"))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Hub form, which rank files are gathered from, and rank files, which hub form is assembled from.

    Every share of four takes many units of work.
    """
    folder, (name, sizes) = tmp_path_factory.mktemp("several"), MODELS["qwen3_moe"]
    larger = {"hidden_size": 96, "vocab_size": 2003, "moe_intermediate_size": 64}
    tiny_model(getattr(transformers, name)(**sizes | larger)).save_pretrained(folder / "hub", max_shard_size="1MB")
    execute_reshard(plan_reshard(folder / "hub", Mesh(tp=4)), folder / "ranks")
    return {"ranks": folder / "hub", "dcp": folder / "ranks", "hub": folder / "ranks"}


@pytest.fixture(scope="module")
def planned(sources: dict[str, Path]) -> dict[str, ReshardPlan]:
    return {name: plan_reshard(sources[name], target=target) for name, target in TARGETS.items()}


@pytest.mark.parametrize("count", [1, 2, 3, 4, 50])
@pytest.mark.parametrize("name", TARGETS)
def test_shares_are_the_whole_and_even(name: str, count: int, planned: dict[str, ReshardPlan]) -> None:
    table = planned[name].copy_plan
    shares = [select_rank_share(table, rank, count) for rank in range(count)]
    assert sorted(run for share in shares for run in share.copies) == sorted(table.copies)
    assert covers(
        (run for share in shares for run in share.copies), {n: at.size for n, at in enumerate(table.destinations)}
    )
    for assembled in table.narrow_destinations:
        assert sum(any(run.destination == assembled for run in share.copies) for share in shares) == 1
    if count <= 4:
        sizes = [sum(run.size for run in share.copies) for share in shares]
        largest = max(
            sum(run.size for run in table.copies if run.destination == one) for one in range(len(table.destinations))
        )
        assert max(sizes) - min(sizes) <= 4 * largest


@pytest.mark.parametrize("name", TARGETS)
def test_four_ranks_write_the_bytes_of_one(
    name: str, sources: dict[str, Path], planned: dict[str, ReshardPlan], four_ranks: RankPool, tmp_path: Path
) -> None:
    alone = execute_reshard(planned[name], tmp_path / "alone")
    first, *others = four_ranks.run(distribute_cases.reshard, sources[name], TARGETS[name], tmp_path / "together")
    assert first == (alone.bytes_read, alone.bytes_written)
    assert others == [None] * 3
    assert files(tmp_path / "together") == files(tmp_path / "alone")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "together"]


def test_the_state_of_an_optimizer_goes_along(hub_folder: HubFolder, four_ranks: RankPool, tmp_path: Path) -> None:
    source = with_state(Path(shutil.copytree(hub_folder("qwen3_moe"), tmp_path / "hub")), adamw)
    execute_reshard(plan_reshard(source, target=TARGETS["dcp"]), tmp_path / "alone")
    four_ranks.run(distribute_cases.reshard, source, TARGETS["dcp"], tmp_path / "together")
    assert files(tmp_path / "together") == files(tmp_path / "alone")


def test_ranks_that_want_different_things_are_refused(
    sources: dict[str, Path], two_ranks: RankPool, tmp_path: Path
) -> None:
    targets = [TARGETS["ranks"], ReshardTarget("ranks", Mesh(tp=4))]
    with pytest.raises(
        UsageError,
        match=r"(?s)made different plans.*"
        "hint: run the same command, on the same source and with the same package versions, on every rank",
    ):
        two_ranks.run(distribute_cases.reshard_differently, sources["ranks"], targets, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_one_rank_refuses_all_refuse(sources: dict[str, Path], two_ranks: RankPool, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(DestinationError, match="already exists"):
        two_ranks.run(distribute_cases.reshard, sources["ranks"], TARGETS["ranks"], tmp_path / "out")


def test_a_damaged_source_is_never_committed(sources: dict[str, Path], four_ranks: RankPool, tmp_path: Path) -> None:
    source = Path(shutil.copytree(sources["hub"], tmp_path / "ranks"))
    file = max(source.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1000] ^= 1
    file.write_bytes(content)
    with pytest.raises(MismatchError, match="match the digests in the manifest"):
        four_ranks.run(distribute_cases.reshard, source, TARGETS["hub"], tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["ranks"]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def started(logs: Path, *arguments: object, count: int = 4) -> list[int]:
    """Fork ranks with the environment that torchrun would set, but without an agent that ends them."""
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    children = []
    for rank in range(count):
        if child := os.fork():
            children.append(child)
            continue
        os.environ.update(shared, RANK=str(rank), LOCAL_RANK=str(rank))
        distribute_cases.forked(logs / f"{rank}.json", *arguments)
    return children


@pytest.fixture
def watched() -> Iterator[Watched]:
    """Return a function that waits until so many children have ended and returns their exit codes; none outlives it."""
    running: set[int] = set()

    def wait(children: list[int], count: int = 4) -> dict[int, int]:
        codes: dict[int, int] = {}
        running.update(children)

        def have_ended() -> bool:
            for rank, child in enumerate(children):
                if child in running:
                    found, status = os.waitpid(child, os.WNOHANG)
                    if found:
                        running.discard(child)
                        codes[rank] = os.waitstatus_to_exitcode(status)
            return len(codes) >= count

        wait_until(have_ended)
        return codes

    yield wait
    for child in running:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@pytest.mark.parametrize("lost", [0, 2])
@pytest.mark.parametrize("name", ["ranks", "hub"])
def test_a_killed_rank_is_told_by_the_others_and_gone_on_with(
    name: str, lost: int, sources: dict[str, Path], planned: dict[str, ReshardPlan], tmp_path: Path, watched: Watched
) -> None:
    arguments = (sources[name], TARGETS[name], tmp_path / "out")
    codes = watched(started(tmp_path, *arguments, {lost: distribute_cases.KILLED}))
    assert codes == {rank: -signal.SIGKILL if rank == lost else 2 for rank in range(4)}
    for rank in set(range(4)) - {lost}:
        said = json.loads((tmp_path / f"{rank}.json").read_text())
        assert said["error"] == "WorkerError", said
        assert "run the same command again" in said["hint"]
    assert not (tmp_path / "out").exists()
    journals = {path.name: read_journal(path).units for path in (tmp_path / "out.partial").glob(f"{MARKER}*")}
    assert len(journals) == 4
    assert all(journals.values())  # the lost one's, and those that were done before they learnt of it
    assert watched(started(tmp_path, *arguments, {})) == dict.fromkeys(range(4), 0)
    execute_reshard(planned[name], tmp_path / "alone")
    assert files(tmp_path / "out") == files(tmp_path / "alone")


def test_a_rank_that_hangs_is_given_up_on(sources: dict[str, Path], tmp_path: Path, watched: Watched) -> None:
    out = tmp_path / "out"
    children = started(tmp_path, sources["ranks"], TARGETS["ranks"], out, {2: distribute_cases.STOPPED})
    assert os.WIFSTOPPED(os.waitpid(children[2], os.WUNTRACED)[1])
    distribute_cases.stopped_file(out).touch()
    codes = watched(children, 3)
    assert codes == {0: 2, 1: 2, 3: 2}
    said = json.loads((tmp_path / "0.json").read_text())
    assert said["error"] == "WorkerError"
    assert not (tmp_path / "out").exists()


def torchrun(*command: str) -> subprocess.CompletedProcess[str]:
    launcher = [TORCHRUN, "--nnodes", "1", "--nproc-per-node", "2", "--master-port", str(free_port()), "--no-python"]
    return subprocess.run(
        [*launcher, *command],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=HANG_TIMEOUT,
    )


def went_on(source: Path, out: Path, alone: ReshardResult) -> None:
    """Run the command under torchrun, and see that it goes on with what is there."""
    command = [MIGRATOR, "reshard", str(source), str(out), "--layout", "hf", "--max-memory", "1"]
    done = torchrun(*command, "--format", "json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["bytes_read"] < alone.bytes_read
    assert said["bytes_written"] == alone.bytes_written
    assert files(out) == files(alone.destination)


def test_the_command_goes_on_under_torchrun(
    sources: dict[str, Path], planned: dict[str, ReshardPlan], tmp_path: Path, watched: Watched
) -> None:
    ranks = started(tmp_path, sources["hub"], TARGETS["hub"], tmp_path / "out", {1: distribute_cases.KILLED}, count=2)
    assert watched(ranks, 2) == {0: 2, 1: -signal.SIGKILL}
    went_on(sources["hub"], tmp_path / "out", execute_reshard(planned["hub"], tmp_path / "alone"))


@pytest.mark.full
def test_a_worker_of_torchrun_is_killed(
    sources: dict[str, Path], planned: dict[str, ReshardPlan], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    victim = (
        f"from pathlib import Path; from tests.runtime.checkpoint.resharding import distribute_cases; "
        f"distribute_cases.take_part(Path({str(sources['hub'])!r}), distribute_cases.ReshardTarget('hf'), "
        f"Path({str(out)!r}), {{1: 'killed'}})"
    )
    lost = torchrun(sys.executable, "-c", victim)
    assert lost.returncode == 1
    assert "SIGKILL" in lost.stderr
    assert not out.exists()
    assert read_journal(tmp_path / "out.partial" / f"{MARKER}-00001").units
    went_on(sources["hub"], out, execute_reshard(planned["hub"], tmp_path / "alone"))
