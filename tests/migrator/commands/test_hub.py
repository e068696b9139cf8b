"""Commands that read from or push to the hub: the real client against a local server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from plans.mesh import Mesh
from runtime.checkpoint.resharding.execute import execute_reshard
from runtime.checkpoint.resharding.plan import plan_reshard
from tests.conftest import HubFolder
from tests.hub_server import TOKEN, Hub, serving

RUN = """
import contextlib, io, json, sys
from migrator.cli import main
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["migrator", *arguments]
    out, err, code = io.StringIO(), io.StringIO(), 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as stop:
        code = stop.code
    print(json.dumps([code, out.getvalue(), err.getvalue()]))
"""


class Said(NamedTuple):
    """The exit code of a command and what it printed."""

    code: int
    out: str
    err: str


Migrator = Callable[..., list[Said]]


@pytest.fixture
def hub(hub_folder: HubFolder, tmp_path: Path) -> Iterator[Hub]:
    with serving() as hub:
        hub.add("owner/toy", hub_folder("qwen3_moe"))
        yield hub


@pytest.fixture
def migrator(hub: Hub, tmp_path: Path) -> Migrator:
    """Return a function that runs commands, one after the other, in a process whose hub is the local server."""

    def run(*commands: str) -> list[Said]:
        settings = {
            "HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1", "HF_TOKEN": TOKEN,
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-c", RUN, json.dumps([command.split() for command in commands])],
            env={**os.environ, **settings},
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr
        return [Said(*json.loads(line)) for line in done.stdout.splitlines()]

    return run


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_sources_on_the_hub(hub: Hub, migrator: Migrator, hub_folder: HubFolder, tmp_path: Path) -> None:
    hub.add("owner/planned", hub_folder("qwen3_moe"))
    planned, verified, compared, written, again, unknown, revision = migrator(
        "plan hf://owner/planned --tp 2 --format json",
        "verify hf://owner/toy",
        f"verify owner/toy@main {hub_folder('qwen3_moe')} --format json",
        "reshard hf://owner/toy out --tp 2 --layout ranks --quiet",
        "verify out owner/toy",
        "verify hf://owner/none",
        "reshard owner/toy@v7 never",
    )
    assert (verified.code, written.code, written.out, again.code) == (0, 0, "", 0)
    assert "no digests are recorded" in verified.out
    assert "the same content" in again.out
    assert compared.code == 0
    assert json.loads(compared.out)["ok"] is True
    execute_reshard(plan_reshard(hub_folder("qwen3_moe"), Mesh(tp=2)), tmp_path / "local")
    assert files(tmp_path / "out") == files(tmp_path / "local")
    assert json.loads(planned.out)["model_type"] == "qwen3_moe"
    # A plan needs the config alone, and nothing is fetched twice.
    assert sorted(hub.fetched) == sorted([*hub.files["owner/toy"], "config.json"])
    assert (unknown.code, revision.code) == (2, 2)
    assert "no such repository" in unknown.err
    assert "no such revision" in revision.err
    assert not (tmp_path / "never").exists()


def test_the_result_is_pushed_once_it_is_committed(hub: Hub, migrator: Migrator, tmp_path: Path) -> None:
    human, machine, wrong = migrator(
        "reshard hf://owner/toy out --tp 2 --layout ranks --push-to owner/new --events log",
        "reshard out back --push-to owner/back --format json --quiet",
        "reshard out nowhere --push-to owner/new@main",
    )
    assert human.code == machine.code == 0
    assert f"pushed to {hub.address}/owner/new" in human.out
    assert json.loads(machine.out)["pushed"] == f"{hub.address}/owner/back"
    assert hub.files["owner/new"] == files(tmp_path / "out")
    assert hub.files["owner/back"] == hub.files["owner/toy"]
    assert [json.loads(line)["event"] for line in (tmp_path / "log").read_text().splitlines()][-2:] == [
        "finished",
        "pushed",
    ]
    assert wrong.code == 2
    assert not (tmp_path / "nowhere").exists()


def test_a_push_that_fails_leaves_the_result_and_the_same_command_finishes_it(
    hub: Hub, migrator: Migrator, tmp_path: Path
) -> None:
    command = "reshard hf://owner/toy out --push-to owner/new --format json"
    hub.refuses_commits = True
    [failed] = migrator(command)
    assert failed.code == 2
    assert failed.out == ""
    assert "then run the same command again" in failed.err
    assert files(tmp_path / "out") == hub.files["owner/toy"]
    hub.refuses_commits = False
    uploaded = list(hub.uploaded)
    [again, quiet] = migrator(command, f"{command} --quiet --events log")
    assert again.code == quiet.code == 0, again.err
    assert "is there already" in again.err
    assert quiet.err == ""
    assert json.loads(again.out) == {
        "destination": "out", "files": sorted(hub.files["owner/toy"]), "kept": True,
        "pushed": f"{hub.address}/owner/new",
    }  # fmt: skip
    assert hub.files["owner/new"] == files(tmp_path / "out")
    assert hub.uploaded == uploaded


def test_only_the_planned_result_is_pushed_in_place_of_a_new_one(hub: Hub, migrator: Migrator, tmp_path: Path) -> None:
    [_] = migrator("reshard hf://owner/toy out")
    damaged = tmp_path / "out" / "model-00001-of-00004.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    for refused in migrator(
        "reshard hf://owner/toy out --push-to owner/new",
        "reshard hf://owner/toy out --push-to owner/new --tp 2",
        "reshard hf://owner/toy out --push-to owner/new --dry-run",
    ):
        assert refused.code == 2
        assert "already exists" in refused.err
    assert "owner/new" not in hub.files


@pytest.mark.full
def test_rank_files_on_the_hub_are_validated(
    hub: Hub, migrator: Migrator, rank_folder: Callable[[str, int], Path]
) -> None:
    hub.add("owner/ranks", rank_folder("qwen3_moe", 2))
    [proven] = migrator("validate hf://owner/ranks --tp 2 --reference owner/toy --format json")
    assert proven.code == 0, proven.err
    assert json.loads(proven.out)["ok"] is True
