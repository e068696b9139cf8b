"""Metadata written and read by several releases of torch, each in its own Python, and folders that they save lossy.

`make test-torch PYTHONS=…` gives the Pythons. They need torch, safetensors, numpy and what torch itself needs.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from plans.errors import IncompleteError
from runtime.checkpoint.resharding.output_files import ReshardTarget
from runtime.checkpoint.resharding.plan import plan_reshard
from tests.conftest import HubFolder

PYTHONS = [name for name in os.environ.get("MIGRATOR_TORCH_PYTHONS", "").split() if name]
PROGRAM = "tests.runtime.checkpoint.dcp.torch_exchange"
ROOT = Path(__file__).parents[4]

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(not PYTHONS, reason="MIGRATOR_TORCH_PYTHONS names no Python with another torch"),
]


def run(python: str, *arguments: str | Path) -> str:
    command = [python, "-W", "ignore", *map(str, arguments)]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_every_torch_reads_what_every_torch_writes(tmp_path: Path) -> None:
    pythons = [*PYTHONS, sys.executable]
    for number, writer in enumerate(pythons):
        run(writer, "-m", PROGRAM, "write", tmp_path / str(number))
        for reader in pythons:
            run(reader, "-m", PROGRAM, "read", tmp_path / str(number))


@pytest.mark.parametrize("python", PYTHONS)
def test_a_tensor_that_torch_saved_without_all_of_its_chunks_is_lossy(
    python: str, hub_folder: HubFolder, tmp_path: Path
) -> None:
    module = "torch.distributed.checkpoint"
    if run(python, "-c", f"import {module} as dcp; print(hasattr(dcp, 'CheckpointableTensor'))").strip() != "True":
        pytest.skip("this torch has no CheckpointableTensor")
    run(python, "-m", PROGRAM, "lossy", hub_folder("llama"), tmp_path)
    assert len(list(tmp_path.iterdir())) == 6
    for folder in tmp_path.iterdir():
        (folder / "config.json").write_bytes((hub_folder("llama") / "config.json").read_bytes())
        with pytest.raises(IncompleteError, match="the checkpoint is lossy"):
            plan_reshard(folder, target=ReshardTarget("hf"))
