"""The commands on source files run where Python lacks what only Linux or POSIX has."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.codemods.helpers import MIGRATED, PACKED, REGULAR, write_tree
from tests.codemods.repositories import commit, git

# `subprocess` itself needs fcntl's neighbours on POSIX; only what our own code could import is hidden.
RUN = """
import os, signal, subprocess, sys, tempfile

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"fcntl", "grp", "pwd", "resource", "termios", "torch", "transformers"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

for name in ("fcntl", "grp", "pwd", "resource", "termios"):
    sys.modules.pop(name, None)
sys.meta_path.insert(0, Missing())
for name in (
    "O_CLOEXEC", "O_DIRECT", "O_DIRECTORY", "O_NOFOLLOW", "O_NONBLOCK", "copy_file_range", "fchmod", "fchown", "fork",
    "killpg", "mkfifo", "posix_fadvise", "posix_fallocate", "pread", "preadv", "pwrite", "pwritev", "sched_getaffinity",
    "sched_setaffinity", "sendfile", "setsid", "uname",
):
    delattr(os, name)
del signal.SIGKILL

from migrator.cli import main
main()
"""


def run(folder, *arguments):
    command = [sys.executable, "-c", RUN, *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def tree(tmp_path):
    return write_tree(tmp_path, {"toy/configuration_toy.py": PACKED, "toy/modeling_toy.py": REGULAR})


def test_rewrite(tree):
    path = tree / "toy" / "configuration_toy.py"
    path.chmod(0o640)
    code, _, stderr = run(tree, "rewrite", "toy")
    assert (code, "error" in stderr) == (0, False), stderr
    assert path.read_text() == MIGRATED.lstrip()
    assert path.stat().st_mode & 0o777 == 0o640


def test_check(tree):
    code, stdout, stderr = run(tree, "check", "toy", "--format", "json")
    assert code == 1, stderr
    report = json.loads(stdout)
    assert [change["path"] for change in report["changes"]] == ["toy/configuration_toy.py"]
    assert report["errors"] == []


def test_diff(tree):
    git(tree, "init", "-q", "-b", "main")
    commit(tree, "packed")
    (tree / "toy" / "configuration_toy.py").write_text(MIGRATED.lstrip())
    code, stdout, stderr = run(tree, "diff", "HEAD", "--format", "json")
    assert code in (0, 1), stderr
    assert json.loads(stdout)["errors"] == []


def test_explain(tmp_path):
    code, stdout, stderr = run(tmp_path, "explain", "MIG001")
    assert code == 0, stderr
    assert "moe_tp_gate_up_colwise" in stdout
