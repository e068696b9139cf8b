"""Standard output stays free for data while ranks are joined."""

from __future__ import annotations

import os
import subprocess
import sys

NOISY = """
import ctypes, os
from runtime.processes.group import process_group
print("before")
with process_group(30):
    ctypes.CDLL(None).puts(b"of a library")
    os.write(1, b"of a system call\\n")
    print("of Python")
print("after")
"""


def test_what_is_written_while_ranks_are_joined_goes_to_standard_error() -> None:
    rank = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    done = subprocess.run([sys.executable, "-c", NOISY], env={**os.environ, **rank}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "before\nafter\n"
    assert {"of a library", "of a system call", "of Python"} <= set(done.stderr.splitlines())
