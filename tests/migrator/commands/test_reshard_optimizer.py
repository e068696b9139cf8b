"""`migrator reshard` of a checkpoint with an optimizer's state: resharded, left behind, or missing."""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from migrator.cli import main
from tests.conftest import HubFolder

STATE = "optimizer.state.model.norm.weight"


@pytest.fixture
def source(hub_folder: HubFolder, tmp_path: Path) -> Path:
    """Return a checkpoint with the state of an optimizer that trained its last norm only."""
    folder = Path(shutil.copytree(hub_folder("llama"), tmp_path / "source"))
    state = {"state.model.norm.weight.momentum_buffer": torch.ones(32), "param_groups.model.norm.weight.lr": 0.1}
    with warnings.catch_warnings(action="ignore"):
        dcp.save({"optimizer": state}, checkpoint_id=folder, no_dist=True)
    return folder


@pytest.fixture
def migrator(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["migrator", "reshard", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        return stop.value.code, captured.out, captured.err

    return run


def test_the_state_is_resharded_and_reported(migrator, source, tmp_path):
    code, output, errors = migrator(source, tmp_path / "out", "--fsdp", 2)
    assert code == 0
    assert "with the optimizer's state: 1 tensor in 2 files" in output
    assert "the optimizer has no state for 37 parameters" in errors
    code, output, _ = migrator(tmp_path / "out", tmp_path / "again", "--tp", 2, "--format", "json")
    result = json.loads(output)
    optimizer = result["optimizer"]
    assert (optimizer["tensors"], optimizer["values"], len(optimizer["stateless"])) == (1, 1, 37)
    assert {"__0_0.distcp", ".metadata"} <= set(result["files"])


def test_a_dry_run_shows_the_state(migrator, source, tmp_path):
    _, output, _ = migrator(source, tmp_path / "out", "--fsdp", 2, "--dry-run", "--format", "json")
    groups = {group["name"]: group for group in json.loads(output)["groups"]}
    assert groups[f"{STATE}.momentum_buffer"]["new"] == "fsdp: Shard(0)"
    assert groups[f"{STATE}.momentum_buffer"]["bytes_written"] == 128


@pytest.mark.parametrize(
    ("arguments", "goes"), [((), False), (("--optimizer",), True), (("--tp", 2, "--no-optimizer"), False)]
)
def test_the_state_can_be_left_behind(arguments, goes, migrator, source, tmp_path):
    code, _, errors = migrator(source, tmp_path / "out", *arguments)
    assert code == 0
    assert (tmp_path / "out" / ".metadata").exists() == goes
    assert ("left behind the optimizer's state" in errors) != goes


def test_requiring_a_missing_state_is_an_error(migrator, hub_folder, tmp_path):
    code, _, errors = migrator(hub_folder("llama"), tmp_path / "out", "--tp", 2, "--optimizer")
    assert code == 2
    assert "contains no optimizer's state" in errors
    assert not (tmp_path / "out").exists()
