"""The GPU benchmark's script runs, on two CPU ranks and a tiny model, and every system there computes the same."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.waiting import HANG_TIMEOUT

ROOT = Path(__file__).parents[1]
SYSTEMS = {"unsharded", "migrator tp", "migrator ep", "migrator tp_ep", "migrator sp", "migrator sp_ep"}


@pytest.mark.full
def test_every_system_computes_the_same(tmp_path: Path) -> None:
    answer = tmp_path / "figures.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(ROOT / "benchmarks" / "gpu_step.py"), "--device", "cpu", "--shape", "tiny", "--dtypes", "float32"]
    command += ["--rounds", "1", "--steps", "1", "--json", str(answer)]
    subprocess.run(command, check=True, timeout=HANG_TIMEOUT, capture_output=True, cwd=tmp_path)
    rows = json.loads(answer.read_text("utf-8"))["rows"]
    assert {row["system"] for row in rows} >= SYSTEMS
    for row in rows:
        assert row["logits_error"] < 1e-5, row
        assert row["gradients_error"] < 1e-5, row
