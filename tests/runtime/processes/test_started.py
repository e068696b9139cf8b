"""A started rank knows that it is one, and leaves at once."""

from __future__ import annotations

import subprocess
import sys

import pytest

from runtime.processes.started import is_worker_process
from tests.waiting import HANG_TIMEOUT


def test_a_worker_leaves_without_the_interpreters_own_ending() -> None:
    code = (
        "import atexit, sys; from runtime.processes.started import exit_now\n"
        "atexit.register(print, 'the interpreter ended')\n"
        "print('said'); print('told', file=sys.stderr); exit_now(3)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, check=False, timeout=HANG_TIMEOUT)
    assert (done.returncode, done.stdout, done.stderr) == (3, b"said\n", b"told\n")


def test_being_a_worker_shows_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_worker_process()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("RANK", "0")
    assert is_worker_process()
