"""Proofs run however Python is started; an assert would vanish."""

from __future__ import annotations

import subprocess
import sys

import pytest

from runtime.proof import prove

INCOMPLETE_PLAN = """
from pathlib import Path
from runtime.checkpoint.copying import copy_plan
from runtime.checkpoint.copying.copy_plan import Destination, build_copy_plan
from runtime.tensor_map.tensor_map import whole
from runtime.checkpoint.files.safetensors import StoredTensor

plan_copies = copy_plan.plan_copies
copy_plan.plan_copies = lambda *arguments: list(plan_copies(*arguments))[:-1]
stored = StoredTensor(Path("a"), "F32", (2,), 0, 8)
build_copy_plan({"s": stored}, [(Destination("t", 8), whole("s", (2,)))])
"""


def test_what_does_not_hold_stops_the_work() -> None:
    prove(True, "one is one")
    with pytest.raises(AssertionError, match="one is two"):
        prove(False, "one is two")


def test_an_incomplete_copy_plan_is_refused_by_an_optimizing_python_too() -> None:
    done = subprocess.run([sys.executable, "-O", "-c", INCOMPLETE_PLAN], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "AssertionError: the copy plan does not write every byte exactly once" in done.stderr
