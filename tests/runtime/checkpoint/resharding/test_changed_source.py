"""A source that is changed while it is read is never committed; a run stopped behind the copying is gone on with."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from plans.errors import CheckpointError, DestinationError, MismatchError
from plans.mesh import Mesh
from runtime.checkpoint.copying.journal import read_journal
from runtime.checkpoint.files.file_names import MARKER
from runtime.checkpoint.files.lock import hold_lock
from runtime.checkpoint.ranks.files import rank_file_name
from runtime.checkpoint.resharding import execute
from runtime.checkpoint.resharding.execute import ReshardOptions, execute_reshard
from runtime.checkpoint.resharding.output_files import ReshardTarget
from runtime.checkpoint.resharding.plan import ReshardPlan, plan_reshard
from tests.conftest import HubFolder, RankFolder
from tests.runtime.checkpoint.resharding.test_crash import files


@pytest.fixture
def hub(hub_folder: HubFolder, tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(hub_folder("qwen2"), tmp_path / "hub"))
    (folder / "notes.txt").write_text("first")
    return folder


@pytest.fixture
def plan(hub: Path) -> ReshardPlan:
    return plan_reshard(hub, Mesh(tp=2))


def replaced(path: Path) -> None:
    """Put another file of the same bytes and times in a file's place."""
    copy = shutil.copy2(path, path.with_suffix(".new"))
    Path(copy).rename(path)


def rewritten(path: Path) -> None:
    """Write the same number of other bytes into a file."""
    with path.open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        stream.write(b"\x55")


def weights(folder: Path) -> Path:
    return min(folder.glob("*.safetensors"))


CHANGES: dict[str, tuple[Callable[[Path], Path], Callable[[Path], object]]] = {
    "weights replaced": (weights, replaced),
    "weights rewritten": (weights, rewritten),
    "a side file rewritten": (lambda folder: folder / "notes.txt", rewritten),
    "the config replaced": (lambda folder: folder / "config.json", replaced),
    "the index removed": (lambda folder: folder / "model.safetensors.index.json", Path.unlink),
}


@pytest.mark.parametrize("case", CHANGES)
@pytest.mark.parametrize("moment", ["planned", "copying"])
def test_a_source_that_changes_is_refused(case: str, moment: str, hub: Path, plan: ReshardPlan, tmp_path: Path) -> None:
    of, change = CHANGES[case]
    changed = of(hub)

    def progress(done: int, total: int, name: str) -> None:
        if moment == "copying" and done == total:
            change(changed)

    if moment == "planned":
        change(changed)
    with pytest.raises(
        MismatchError,
        match=rf"(?s){changed.name}.* changed while it was read.*"
        "hint: wait until nothing writes to this folder, then run the same command again",
    ):
        execute_reshard(plan, tmp_path / "out", ReshardOptions(progress=progress))
    assert [path.name for path in tmp_path.iterdir()] == ["hub"]
    if changed.exists():  # as the hint says, once nothing changes it any more
        execute_reshard(plan_reshard(hub, Mesh(tp=2)), tmp_path / "out")


def test_other_files_of_the_source_may_change(hub: Path, tmp_path: Path) -> None:
    (hub / "training.bin").touch()
    plan = plan_reshard(hub, Mesh(tp=2))
    (hub / "training.bin").write_text("more")
    (hub / "new.txt").touch()
    assert "new.txt" not in execute_reshard(plan, tmp_path / "out").files


def test_a_side_file_that_vanishes_is_named(hub: Path, plan: ReshardPlan, tmp_path: Path) -> None:
    with pytest.raises((CheckpointError, MismatchError), match=r"notes\.txt") as caught:
        execute_reshard(
            plan,
            tmp_path / "out",
            ReshardOptions(progress=lambda done, total, name: (hub / "notes.txt").unlink(missing_ok=True)),
        )
    assert not isinstance(caught.value, DestinationError)


def test_a_side_file_that_cannot_be_read_is_the_sources_fault(
    hub: Path, plan: ReshardPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execute, "check_unchanged", lambda *arguments: (hub / "notes.txt").unlink(missing_ok=True))
    with pytest.raises(CheckpointError, match=r"notes\.txt: cannot be read") as caught:
        execute_reshard(plan, tmp_path / "out")
    assert not isinstance(caught.value, DestinationError)


@pytest.mark.parametrize("place", ["inner", "deep/er"])
def test_a_destination_in_the_source_is_refused(place: str, hub: Path, plan: ReshardPlan) -> None:
    (hub / place).parent.mkdir(exist_ok=True)
    with pytest.raises(DestinationError, match="lies in the source"):
        execute_reshard(plan, hub / place)
    assert not (hub / place).exists()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, OSError(28, "No space left on device")])
def test_a_run_that_ends_between_copying_and_commit_is_gone_on_with(
    how: signal.Signals | OSError, plan: ReshardPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_files = execute.copy_files

    def ending(*arguments: object) -> None:
        if isinstance(how, OSError):
            raise how
        os.kill(os.getpid(), how)
        copy_files(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(execute, "copy_files", ending)
        with pytest.raises(CheckpointError) as caught:
            execute_reshard(plan, tmp_path / "out")
    assert caught.value.hint == (
        "free some space or choose another disk, then run the same command again: it continues where this one stopped"
        if isinstance(how, OSError)
        else "run the same command again to continue from there"
    )
    assert not (tmp_path / "out").exists()
    assert read_journal(tmp_path / "out.partial" / MARKER).units
    said: list[str] = []
    result = execute_reshard(plan, tmp_path / "out", ReshardOptions(say=said.append))
    assert result.bytes_read == 0
    assert "continuing an earlier run" in said[0]
    execute_reshard(plan, tmp_path / "undisturbed")
    assert files(tmp_path / "out") == files(tmp_path / "undisturbed")


def test_ranks_of_an_earlier_run_are_not_written_over(plan: ReshardPlan, tmp_path: Path) -> None:
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / MARKER).touch()
    refused = pytest.raises(DestinationError, match=r"(?s)another run is writing it.*hint: wait for that run to end")
    with hold_lock(partial / f"{MARKER}-00001"), refused:
        execute_reshard(plan, tmp_path / "out")
    assert (partial / MARKER).exists()
    execute_reshard(plan, tmp_path / "out")


def test_a_changed_source_of_rank_files_is_not_said_to_be_damaged(rank_folder: RankFolder, tmp_path: Path) -> None:
    ranks = Path(shutil.copytree(rank_folder("qwen2", 2), tmp_path / "ranks"))
    plan = plan_reshard(ranks, target=ReshardTarget("hf"))
    rewritten(ranks / rank_file_name(1, 2))
    with pytest.raises(MismatchError, match="changed while it was read"):
        execute_reshard(plan, tmp_path / "out")
