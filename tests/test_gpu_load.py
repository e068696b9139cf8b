"""The loading benchmark's script runs, on two CPU ranks and a tiny model, and every system there loads the same."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.waiting import HANG_TIMEOUT

ROOT = Path(__file__).parents[1]
SYSTEMS = {"plain bytes", "migrator ranks", "migrator hub", "transformers"}


@pytest.mark.full
def test_every_system_loads_the_same(tmp_path: Path) -> None:
    answer = tmp_path / "figures.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(ROOT / "benchmarks" / "gpu_load.py"), "--device", "cpu", "--shape", "tiny", "--rounds", "1"]
    subprocess.run(
        [*command, "--json", str(answer)], check=True, timeout=HANG_TIMEOUT, capture_output=True, cwd=tmp_path
    )
    rows = json.loads(answer.read_text("utf-8"))["rows"]
    assert {row["system"] for row in rows} >= SYSTEMS
    assert all(row["equal"] for row in rows if row["system"] != "plain bytes")
    assert [row["right"] for row in rows if "migrator" in row["system"]] == [True, True]
