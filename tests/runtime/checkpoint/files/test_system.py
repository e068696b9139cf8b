"""Reshards on systems that lack some of Linux's calls: what can be done without them is done, the rest is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from plans.errors import MigratorError, UsageError
from plans.mesh import Mesh
from runtime.checkpoint.files import system
from runtime.checkpoint.files.lock import hold_temporary_lock
from runtime.checkpoint.resharding.estimate import estimate
from runtime.checkpoint.resharding.execute import execute_reshard
from runtime.checkpoint.resharding.plan import plan_reshard
from tests.conftest import HubFolder

DISPENSABLE = ("fdatasync", "posix_fadvise", "POSIX_FADV_DONTNEED", "preadv", "sched_getaffinity", "copy_file_range")
LINUX_ONLY = (*DISPENSABLE, "pread", "pwrite", "statvfs", "O_CLOEXEC", "O_NOFOLLOW", "O_NONBLOCK")

IMPORTING = f"""
import os, sys
import pytest, torch, transformers  # whose own imports are their own affair
sys.modules["fcntl"] = None
for name in {LINUX_ONLY}:
    vars(os).pop(name, None)
from runtime.checkpoint.files import system
import runtime.checkpoint.resharding.distribute
import runtime.checkpoint.resharding.estimate
import migrator.jobs
from runtime.loader.transfer import default_threads
from runtime.validation.worker import run_validation
assert default_threads() >= 1
assert system.fcntl is None
"""


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_checkpoints_are_imported_without_the_calls_of_linux() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORTING], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_reshard_does_without_what_only_saves_time_or_space(
    hub_folder: HubFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    execute_reshard(plan_reshard(hub_folder("llama"), Mesh(tp=2)), tmp_path / "linux")
    for name in DISPENSABLE:
        monkeypatch.delattr(os, name)
    monkeypatch.setattr(sys, "platform", "darwin")
    plan = plan_reshard(hub_folder("llama"), Mesh(tp=2))
    assert estimate(plan, tmp_path / "other", 2**24).bytes_shared == 0
    result = execute_reshard(plan, tmp_path / "other")
    assert result.bytes_shared == 0
    assert files(tmp_path / "other") == files(tmp_path / "linux")


@pytest.mark.parametrize(("missing", "words"), [("pwrite", "writes at an offset"), ("fcntl", "file locks")])
def test_a_reshard_that_could_not_be_safe_is_refused_in_one_line(
    missing: str, words: str, hub_folder: HubFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_reshard(hub_folder("llama"), Mesh(tp=2))
    if missing == "fcntl":
        monkeypatch.setattr(system, "fcntl", None)
    else:
        monkeypatch.delattr(os, missing)
    with pytest.raises(MigratorError) as caught:
        execute_reshard(plan, tmp_path / "out")
    assert isinstance(caught.value, UsageError)
    assert words in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.hint == "run this command on Linux or macOS"
    assert list(tmp_path.iterdir()) == []


def test_reads_at_an_offset_are_refused_where_there_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"0123456789")
    buffer = bytearray(4)
    with (tmp_path / "file").open("rb") as stream:
        monkeypatch.delattr(os, "preadv")
        assert system.read_at(stream.fileno(), memoryview(buffer), 3) == 4
        assert buffer == b"3456"
        monkeypatch.delattr(os, "pread")
        with pytest.raises(UsageError, match="reads at an offset"):
            system.read_at(stream.fileno(), memoryview(buffer), 3)


def test_a_lock_that_cannot_be_held_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "fcntl", None)
    with pytest.raises(UsageError, match="file locks"), hold_temporary_lock(tmp_path / "out.partial.lock"):
        pytest.fail("the body must not run")
    assert list(tmp_path.iterdir()) == []
