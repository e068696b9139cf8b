"""Committing: the destination appears whole or not at all, and nothing that is not ours is touched."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from plans.errors import DestinationError
from runtime.checkpoint.copying.commit import stage_folder
from runtime.checkpoint.files.file_names import MARKER
from tests.waiting import HANG_TIMEOUT


def test_the_destination_appears_at_the_end(tmp_path: Path) -> None:
    with stage_folder(tmp_path / "out", 10) as folder:
        (folder / "file").write_text("content")
        assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["file"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_failure_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def write_and_fail() -> None:
        with stage_folder(tmp_path / "out", 10) as folder:
            (folder / "file").write_text("content")
            raise error

    with pytest.raises(error):
        write_and_fail()
    assert list(tmp_path.iterdir()) == []


def test_a_failing_disk_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(DestinationError, match="No space") as caught, stage_folder(tmp_path / "out", 10):
        raise OSError(28, "No space left on device")
    assert "free some space" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch, lambda path: path.symlink_to("nowhere")])
def test_an_existing_destination_is_refused(tmp_path: Path, make: object) -> None:
    make(tmp_path / "out")  # type: ignore[operator]
    with pytest.raises(DestinationError, match="already exists"), stage_folder(tmp_path / "out", 10):
        pytest.fail("the body must not run")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_destination_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(DestinationError, match="already exists"), stage_folder(tmp_path / "out", 10):
        (tmp_path / "out").mkdir()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def a_checkpoint(folder: Path, text: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_text(text)
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


REPLACED = ["out", "out/config.json", "out/model.safetensors"]


def test_a_checkpoint_is_replaced_where_that_is_asked_for(tmp_path: Path) -> None:
    out = a_checkpoint(tmp_path / "out", "old")
    with stage_folder(out, 10, overwrite=True) as folder:
        a_checkpoint(folder, "new")
        assert (out / "model.safetensors").read_text() == "old"
    assert names(tmp_path) == REPLACED
    assert (out / "model.safetensors").read_text() == "new"


REPLACING = """
import os, sys; from pathlib import Path; from runtime.checkpoint.copying import commit
out, rename = Path(sys.argv[1]), Path.rename
def dying(path, target):
    if path.name == sys.argv[2] and sys.argv[3] == "before":
        os.kill(os.getpid(), 9)
    rename(path, target)
    if path.name == sys.argv[2]:
        os.kill(os.getpid(), 9)
Path.rename = dying
with commit.stage_folder(out, 10, overwrite=True) as folder:
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_text("new")
"""


@pytest.mark.parametrize("name", ["out", "out.partial"])
@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_run_killed_while_replacing_loses_neither(tmp_path: Path, name: str, moment: str) -> None:
    out = a_checkpoint(tmp_path / "out", "old")
    killed = subprocess.run([sys.executable, "-c", REPLACING, str(out), name, moment], check=False)
    assert killed.returncode == -9
    with stage_folder(out, 10, overwrite=True) as folder:
        is_new = (name, moment) == ("out.partial", "after")
        assert (out / "model.safetensors").read_text() == ("new" if is_new else "old")
        a_checkpoint(folder, "newer")
    assert names(tmp_path) == REPLACED
    assert (out / "model.safetensors").read_text() == "newer"


def test_a_folder_of_the_name_that_replacing_uses_is_left_alone(tmp_path: Path) -> None:
    mine = a_checkpoint(tmp_path / "out.replaced", "mine")
    out = a_checkpoint(tmp_path / "out", "old")
    with pytest.raises(DestinationError, match="not left by migrator"), stage_folder(out, 10, overwrite=True):
        pytest.fail("the body must not run")
    assert (mine / "model.safetensors").read_text() == "mine"


def test_what_cannot_fit_is_refused_first(tmp_path: Path) -> None:
    with pytest.raises(DestinationError, match="free"), stage_folder(tmp_path / "out", 2**60):
        pytest.fail("the body must not run")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_parent_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DestinationError, match="not a folder"), stage_folder(tmp_path / "no" / "out", 1):
        pytest.fail("the body must not run")


def test_a_folder_that_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "mine").write_text("precious")
    with pytest.raises(DestinationError, match="not left by migrator"), stage_folder(tmp_path / "out", 1):
        pytest.fail("the body must not run")
    assert (partial / "mine").read_text() == "precious"


def test_a_link_at_the_working_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / MARKER).touch()
    (tmp_path / "out.partial").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DestinationError, match="not left by migrator"), stage_folder(tmp_path / "out", 1):
        pytest.fail("the body must not run")
    assert (tmp_path / "elsewhere" / MARKER).exists()


def test_what_a_killed_run_left_is_cleared(tmp_path: Path) -> None:
    script = (
        "import os, sys; from pathlib import Path; from runtime.checkpoint.copying.commit import stage_folder\n"
        "with stage_folder(Path(sys.argv[1]), 1) as folder:\n"
        "    (folder / 'half').write_text('half'); os.kill(os.getpid(), 9)"
    )
    killed = subprocess.run([sys.executable, "-c", script, str(tmp_path / "out")], check=False)
    assert killed.returncode == -9
    assert (tmp_path / "out.partial" / "half").exists()
    with stage_folder(tmp_path / "out", 1) as folder:
        (folder / "whole").write_text("whole")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "whole"]


def test_two_runs_at_once_are_refused(tmp_path: Path) -> None:
    with stage_folder(tmp_path / "out", 1) as folder:
        with pytest.raises(DestinationError, match="another run"), stage_folder(tmp_path / "out", 1):
            pytest.fail("the body must not run")
        (folder / "file").touch()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["file"]


COMMITTING = """
import sys
from pathlib import Path
from runtime.checkpoint.copying import commit

sync = commit.sync

def wait_and_sync(path):
    if path.name == "out.partial" and (path / "migrator.json").exists():
        print("ready", flush=True)
        sys.stdin.readline()
    sync(path)

commit.sync = wait_and_sync
with commit.stage_folder(Path(sys.argv[1]) / "out", 1) as folder:
    (folder / "migrator.json").write_text("first")
"""


def test_a_run_between_its_last_two_steps_is_not_taken_for_a_leftover(tmp_path: Path) -> None:
    command = [sys.executable, "-c", COMMITTING, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdin is not None
        assert first.stdout is not None
        assert first.stdout.readline() == "ready\n"
        assert not (tmp_path / "out").exists()
        with pytest.raises(DestinationError, match="another run"), stage_folder(tmp_path / "out", 1):
            pytest.fail("the body must not run")
        first.stdin.close()  # which lets it continue
        assert first.wait(HANG_TIMEOUT) == 0
    assert (tmp_path / "out" / "migrator.json").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_lock_file_of_a_killed_run_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "out.partial.lock").touch()
    with stage_folder(tmp_path / "out", 1) as folder:
        (folder / "file").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "file"]


@pytest.mark.parametrize(
    "make", [lambda path: path.write_text("mine"), lambda path: path.symlink_to("mine"), lambda path: path.mkdir()]
)
def test_what_lies_where_the_lock_goes_is_left_alone(tmp_path: Path, make: Callable[[Path], object]) -> None:
    make(tmp_path / "out.partial.lock")
    with pytest.raises(DestinationError), stage_folder(tmp_path / "out", 1):
        pytest.fail("the body must not run")
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial.lock"]


CONTENDING = """
import sys
import time
from collections.abc import Callable
from pathlib import Path
from plans.errors import DestinationError
from runtime.checkpoint.files.lock import hold_temporary_lock

root, rounds = Path(sys.argv[1]), 0
while rounds < 300:
    try:
        with hold_temporary_lock(root / "out.partial.lock"):
            (root / "held").mkdir()
            (root / "held").rmdir()
            rounds += 1
    except DestinationError:
        pass
"""


def test_processes_that_contend_never_hold_the_lock_together(tmp_path: Path) -> None:
    command = [sys.executable, "-c", CONTENDING, str(tmp_path)]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    for process in processes:
        _, errors = process.communicate(timeout=HANG_TIMEOUT)
        assert process.returncode == 0, errors
    assert list(tmp_path.iterdir()) == []


DISTCP = ["config.json", ".metadata", "__0_0.distcp"]
REPLACEABLE = {
    "hub": ["config.json", "model.safetensors", "tokenizer.json"],
    "indexed": ["config.json", "model.safetensors.index.json", "model-00001-of-00001.safetensors"],
    "shards": ["config.json", "shard-00001-model-00001-of-00001.safetensors", "migrator.json"],
    "ranks": [
        "config.json",
        "migrator.json",
        "rank-00000-of-00001.safetensors",
        "optimizer/.metadata",
        "optimizer/__3_0.distcp",
    ],
    "distcp": DISTCP,
    "empty": [],
    "with a file of the result": ["config.json", "model.safetensors", "original/params.json"],
}
KEPT = {
    "no config": ["model.safetensors"],
    "one file of tensors": ["notes.txt", "images.safetensors"],
    "a thesis beside the weights": ["config.json", "model.safetensors", "thesis.tex"],
    "a thesis in a subfolder": ["config.json", "model.safetensors", "thesis/chapter/one.tex"],
    "an empty subfolder": [*DISTCP, "runs/"],
    "training state inside": [*DISTCP, "step-2/.metadata", "step-2/__0_0.distcp"],
    "another checkpoint inside": ["config.json", "model.safetensors", "step-2/model.safetensors"],
}


def filled(folder: Path, content: list[str]) -> Path:
    folder.mkdir()
    for name in content:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).mkdir() if name.endswith("/") else (folder / name).touch()
    return folder


@pytest.mark.parametrize("case", REPLACEABLE)
def test_every_layout_of_checkpoint_is_replaced(case: str, tmp_path: Path) -> None:
    out = filled(tmp_path / "out", REPLACEABLE[case])
    with stage_folder(out, 10, overwrite=True, names=["original/params.json", "optimizer/.metadata"]) as folder:
        a_checkpoint(folder, "new")
    assert names(tmp_path) == REPLACED


@pytest.mark.parametrize("case", KEPT)
def test_what_is_no_checkpoint_or_more_than_one_is_never_replaced(case: str, tmp_path: Path) -> None:
    out = filled(tmp_path / "out", KEPT[case])
    before = names(tmp_path)
    with pytest.raises(DestinationError) as caught, stage_folder(out, 10, overwrite=True):
        pytest.fail("the body must not run")
    is_checkpoint = "config.json" in KEPT[case]
    assert ("would be lost" if is_checkpoint else "not a checkpoint") in caught.value.message
    assert caught.value.hint == (
        "move these files away, or name a new folder" if is_checkpoint else "name a new folder"
    )
    assert names(tmp_path) == before
    with stage_folder(tmp_path / "new", 10, overwrite=True):
        pass
