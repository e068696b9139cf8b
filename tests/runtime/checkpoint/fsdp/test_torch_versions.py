"""Rank files written by several releases of torch, each in its own Python: `make test-torch PYTHONS=…` gives them."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch

from runtime.checkpoint.resharding.execute import execute_reshard
from runtime.checkpoint.resharding.output_files import ReshardTarget
from runtime.checkpoint.resharding.plan import plan_reshard
from tests.conftest import HubFolder
from tests.runtime.checkpoint.dcp.test_torch_versions import PYTHONS, run
from tests.runtime.checkpoint.hub.test_pickled import load_hub

WRITER = Path(__file__).with_name("rank_writer.py")

pytestmark = pytest.mark.full


@pytest.mark.parametrize(("ddp", "fsdp"), [(1, 2), (2, 1), (2, 2)])
@pytest.mark.parametrize("python", [*PYTHONS, sys.executable])
def test_what_every_torch_writes_is_read(
    python: str, ddp: int, fsdp: int, hub_folder: HubFolder, tmp_path: Path
) -> None:
    expected = load_hub(hub_folder("qwen2"))
    torch.save(expected, tmp_path / "state.pt")
    folder = tmp_path / "ranks"
    folder.mkdir()
    shutil.copy(hub_folder("qwen2") / "config.json", folder)
    run(python, WRITER, tmp_path / "state.pt", folder, str(ddp), str(fsdp))
    execute_reshard(plan_reshard(folder, target=ReshardTarget("hf")), tmp_path / "hub")
    found = load_hub(tmp_path / "hub")
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
