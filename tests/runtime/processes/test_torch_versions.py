"""Ranks as threads under other releases of torch, each in its own Python.

`make test-torch PYTHONS=…` gives the Pythons. They need pytest, hypothesis and transformers beside torch.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

PYTHONS = [name for name in os.environ.get("MIGRATOR_TORCH_PYTHONS", "").split() if name]
ROOT = Path(__file__).parents[3]
TESTS = Path(__file__).with_name("test_thread_ranks.py")

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(not PYTHONS, reason="MIGRATOR_TORCH_PYTHONS names no Python with another torch"),
]


@pytest.mark.parametrize("python", PYTHONS)
def test_threads_are_ranks_under_every_torch(python: str) -> None:
    """Unless this torch is refused with its version, all that thread ranks promise holds under it."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", TESTS]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
