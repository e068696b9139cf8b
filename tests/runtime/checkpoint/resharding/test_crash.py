"""Runs that die, fail or are stopped: the next one continues their work and ends with the same bytes."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest

from plans.errors import CheckpointError, DestinationError
from plans.mesh import Mesh
from runtime.checkpoint.copying import commit, copy
from runtime.checkpoint.copying.copy import plan_units
from runtime.checkpoint.copying.journal import Journal, read_journal
from runtime.checkpoint.files.file_names import MARKER
from runtime.checkpoint.resharding.execute import ReshardOptions, execute_reshard
from runtime.checkpoint.resharding.output_files import ReshardTarget
from runtime.checkpoint.resharding.plan import ReshardPlan, plan_reshard
from runtime.tensor_map.strided_copy import StridedCopy
from tests.calls import observe_steps
from tests.runtime.checkpoint.resharding.killed_runs import (
    SMALL,
    fork,
    kill_halfway,
    record_synchronously,
    wait_for_exit,
)
from tests.waiting import HANG_TIMEOUT

Checkpoint = Callable[[str], Path]


@pytest.fixture(autouse=True)
def small_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copy, "_SLAB", 4096)


@pytest.fixture(scope="module")
def planned(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, ReshardPlan]]:
    """One plan whose bytes are gathered, and one whose destinations are assembled from four files."""
    ranks = tmp_path_factory.mktemp("crash") / "ranks"
    execute_reshard(plan_reshard(checkpoint("qwen3_moe"), Mesh(tp=4)), ranks)
    plans = {
        "to ranks": plan_reshard(checkpoint("qwen3_moe"), Mesh(tp=2)),
        "to hub": plan_reshard(ranks, target=ReshardTarget("hf")),
    }
    assert plans["to hub"].copy_plan.narrow_destinations
    return plans


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def run_and_count(plan: ReshardPlan, destination: Path, last: int = 0) -> int:
    """Execute a plan and return how many steps it takes: calls of functions, ours and others', and returns from them.

    Args:
        last: the step at which the process kills itself, 0 for none.
    """
    numbers, steps = count(1), 0

    def observe(step: str) -> None:
        nonlocal steps
        steps = next(numbers)
        if steps == last:
            os.kill(os.getpid(), signal.SIGKILL)

    with observe_steps(observe):
        execute_reshard(plan, destination, ReshardOptions(max_memory=SMALL, journal_interval=0))
    return steps


def kill_at(step: int, plan: ReshardPlan, destination: Path) -> None:
    """Execute a plan in a process that kills itself at a step; threads may take fewer steps than they did before."""
    assert wait_for_exit(fork(lambda: run_and_count(plan, destination, step))) in (0, -signal.SIGKILL)


@pytest.mark.parametrize("kills", [6, pytest.param(200, marks=pytest.mark.full)])
def test_runs_killed_at_any_moment_end_with_the_same_bytes(
    kills: int, planned: dict[str, ReshardPlan], tmp_path: Path
) -> None:
    moments = random.Random(kills)
    steps = {name: run_and_count(plan, tmp_path / name) for name, plan in planned.items()}
    undisturbed = {name: files(tmp_path / name) for name in planned}
    while kills:
        name = moments.choice(list(planned))
        for _ in range(min(kills, moments.randint(1, 5))):
            kill_at(moments.randint(1, steps[name]), planned[name], tmp_path / "out")
            kills -= 1
            if (tmp_path / "out").exists():
                break
        else:
            execute_reshard(planned[name], tmp_path / "out", ReshardOptions(max_memory=SMALL))
        found = files(tmp_path / "out")
        found.pop(MARKER, None)  # killed between the rename and the end
        assert found == undisturbed[name]
        shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize("name", ["to ranks", "to hub"])
def test_a_killed_run_is_gone_on_with(name: str, planned: dict[str, ReshardPlan], tmp_path: Path) -> None:
    plan, said = planned[name], list[str]()
    whole = execute_reshard(plan, tmp_path / "undisturbed", ReshardOptions(max_memory=SMALL))
    kill_halfway(plan, tmp_path / "out")
    seen: list[int] = []
    result = execute_reshard(
        plan,
        tmp_path / "out",
        ReshardOptions(progress=lambda done, *_: seen.append(done), max_memory=SMALL, say=said.append),
    )
    assert result.bytes_read < whole.bytes_read
    assert result.digests == whole.digests
    assert files(tmp_path / "out") == files(tmp_path / "undisturbed")
    assert seen[-1] == whole.bytes_written
    assert [line for line in said if "continuing an earlier run" in line] == said != []


def part_to_flip(plan: ReshardPlan, replicated: bool) -> tuple[int, StridedCopy]:
    """Return the first run that goes to a file, and to several if asked for, and how many units end with it."""
    for number, unit in enumerate(plan_units(plan.copy_plan, SMALL), 1):
        for slab in unit:
            parts = [part for part in slab.parts if plan.copy_plan.destinations[part.destination].file is not None]
            copies = [part for part in parts if part.source_offset == parts[0].source_offset]
            if not replicated or len(copies) > 1:
                return number, copies[0]
    raise AssertionError("nothing like that is done")


@pytest.mark.parametrize(("name", "replicated"), [("to ranks", False), ("to ranks", True), ("to hub", False)])
def test_a_byte_flipped_in_what_was_done_is_found(
    name: str, replicated: bool, planned: dict[str, ReshardPlan], tmp_path: Path
) -> None:
    plan, said = planned[name], list[str]()
    execute_reshard(plan, tmp_path / "undisturbed", ReshardOptions(max_memory=SMALL))
    units, part = part_to_flip(plan, replicated)
    kill_halfway(plan, tmp_path / "out", units)
    at = plan.copy_plan.destinations[part.destination]
    damaged = tmp_path / "out.partial" / at.file
    content = bytearray(damaged.read_bytes())
    content[at.offset + part.destination_offset + 1] ^= 4
    damaged.write_bytes(content)
    execute_reshard(plan, tmp_path / "out", ReshardOptions(max_memory=SMALL, say=said.append))
    assert "damaged" in said[0]
    assert files(tmp_path / "out") == files(tmp_path / "undisturbed")


def test_another_plan_or_source_begins_anew_and_says_so(checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = Path(shutil.copytree(checkpoint("qwen3_moe"), tmp_path / "hub"))
    said: list[str] = []
    kill_halfway(plan_reshard(source, Mesh(tp=2)), tmp_path / "out")
    assert read_journal(tmp_path / "out.partial" / MARKER).units
    execute_reshard(
        plan_reshard(source, Mesh(tp=4)), tmp_path / "out", ReshardOptions(max_memory=SMALL, say=said.append)
    )
    assert "starting over" in said.pop()
    shutil.rmtree(tmp_path / "out")
    kill_halfway(plan_reshard(source, Mesh(tp=2)), tmp_path / "out")
    os.utime(next(source.glob("*.safetensors")), ns=(1, 1))
    execute_reshard(
        plan_reshard(source, Mesh(tp=2)), tmp_path / "out", ReshardOptions(max_memory=SMALL, say=said.append)
    )
    assert "starting over" in said.pop()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_what_can_be_gone_on_with(
    number: signal.Signals, planned: dict[str, ReshardPlan], tmp_path: Path
) -> None:
    plan = planned["to ranks"]
    total = execute_reshard(plan, tmp_path / "undisturbed", ReshardOptions(max_memory=SMALL)).bytes_read

    asked: list[signal.Signals] = []

    def ask(done: int, total: int, name: str) -> None:
        if done > total // 2 and not asked:
            asked.append(number)  # once: a second signal insists
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with pytest.raises(CheckpointError, match=f"stopped by {number.name}") as caught:
        execute_reshard(plan, tmp_path / "out", ReshardOptions(progress=ask, max_memory=SMALL))
    assert caught.value.hint == "run the same command again to continue from there"
    assert signal.getsignal(number) is before
    assert not (tmp_path / "out").exists()
    assert execute_reshard(plan, tmp_path / "out", ReshardOptions(max_memory=SMALL)).bytes_read < total
    assert files(tmp_path / "out") == files(tmp_path / "undisturbed")


@pytest.mark.parametrize(("code", "words"), [(28, "No space left"), (5, "Input/output error")])
def test_a_failing_disk_leaves_a_journal_that_can_be_used(
    code: int, words: str, planned: dict[str, ReshardPlan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, partial = planned["to hub"], tmp_path / "out.partial"
    execute_reshard(plan, tmp_path / "undisturbed", ReshardOptions(max_memory=SMALL))
    pwrite = os.pwrite

    def full(descriptor: int, view: memoryview, offset: int) -> int:
        if read_journal(partial / MARKER).units:
            raise OSError(code, os.strerror(code))
        return pwrite(descriptor, view, offset)

    with monkeypatch.context() as patched:
        patched.setattr(Journal, "record", record_synchronously)
        patched.setattr("os.pwrite", full)
        with pytest.raises(DestinationError, match=words) as caught:
            execute_reshard(plan, tmp_path / "out", ReshardOptions(max_memory=SMALL, journal_interval=0))
    assert "continues where this one stopped" in caught.value.hint
    assert read_journal(partial / MARKER).units
    said: list[str] = []
    execute_reshard(plan, tmp_path / "out", ReshardOptions(max_memory=SMALL, say=said.append))
    assert "continuing an earlier run" in said[0]
    assert files(tmp_path / "out") == files(tmp_path / "undisturbed")


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 512 KiB, where mounting one is allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", folder]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not allowed here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_that_fills_up_is_refused_before_and_reported_during(
    checkpoint: Checkpoint, tiny_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_reshard(checkpoint("qwen3_moe"), Mesh(tp=2))
    assert plan.bytes_needed < 2**19
    (tiny_disk / "ballast").write_bytes(bytes(2**19 - plan.bytes_needed // 2))
    with pytest.raises(DestinationError, match=" free"):
        execute_reshard(plan, tiny_disk / "out", ReshardOptions(max_memory=SMALL))
    monkeypatch.setattr(commit, "_check_space", lambda *_: None)  # as if others filled it meanwhile
    with pytest.raises(DestinationError, match="No space left") as caught:
        execute_reshard(plan, tiny_disk / "out", ReshardOptions(max_memory=SMALL, journal_interval=0))
    assert caught.value.data["errno"] == 28
    (tiny_disk / "ballast").unlink()
    execute_reshard(plan, tiny_disk / "out", ReshardOptions(max_memory=SMALL))
    execute_reshard(plan, tiny_disk.parent / "undisturbed", ReshardOptions(max_memory=SMALL))
    assert files(tiny_disk / "out") == files(tiny_disk.parent / "undisturbed")


def test_a_disk_that_cannot_sync_is_no_silent_success(
    planned: dict[str, ReshardPlan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("os.fdatasync", fail)
    with pytest.raises(DestinationError, match="Input/output error"):
        execute_reshard(planned["to hub"], tmp_path / "out", ReshardOptions(max_memory=SMALL, journal_interval=0))
    assert list(tmp_path.iterdir()) == []


def test_copying_does_not_wait_for_the_journal(
    planned: dict[str, ReshardPlan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fdatasync, copied, in_time = os.fdatasync, threading.Event(), list[bool]()

    def waiting(descriptor: int) -> None:
        in_time.append(copied.wait(HANG_TIMEOUT))  # ends early unless copying waits for this very sync
        fdatasync(descriptor)

    def progress(done: int, total: int, name: str) -> None:
        if done == total:
            copied.set()

    monkeypatch.setattr("os.fdatasync", waiting)
    execute_reshard(planned["to hub"], tmp_path / "out", ReshardOptions(progress=progress, journal_interval=0))
    assert in_time
    assert all(in_time), "the last byte was copied while the first sync was waiting for it"


def test_a_journal_that_was_cut_short_counts_as_far_as_it_is_whole(
    planned: dict[str, ReshardPlan], tmp_path: Path
) -> None:
    plan, marker = planned["to ranks"], tmp_path / "out.partial" / MARKER
    execute_reshard(plan, tmp_path / "undisturbed", ReshardOptions(max_memory=SMALL))
    kill_halfway(plan, tmp_path / "out")
    whole = marker.read_bytes()
    kept = read_journal(marker)
    for cut in (1, 9, 40):
        marker.write_bytes(whole[:-cut])
        assert read_journal(marker).units < kept.units
    marker.write_bytes(whole + b"0000 {not json")
    assert read_journal(marker) == kept
    execute_reshard(plan, tmp_path / "out", ReshardOptions(max_memory=SMALL))
    assert files(tmp_path / "out") == files(tmp_path / "undisturbed")
