"""`migrator rewrite` killed at any moment, or run twice at once: every file is the old one or the new one."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.codemods.helpers import MIGRATED, PACKED, REGULAR, write_tree

pytestmark = pytest.mark.slow
MIGRATOR = str(Path(sys.executable).with_name("migrator"))
MODELS = 120

# Kills itself at the given step of its writing: before a new file is made, opened, or put in the old one's place.
KILLED = """
import os, signal, sys
from migrator.cli import main

tree, moment, seen = sys.argv.pop(1), int(sys.argv.pop(1)), []

def hook(event, arguments):
    steps = event in ("open", "tempfile.mkstemp", "os.rename") and str(arguments[0]).startswith(tree)
    if steps and str(arguments[0]).endswith(".migrator"):
        seen.append(event)
        if len(seen) == moment:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(hook)
main()
"""
STEPS = 3


@pytest.fixture
def tree(tmp_path):
    files = {}
    for number in range(MODELS):
        files[f"m{number}/configuration_m{number}.py"] = PACKED.replace("Toy", f"M{number}")
        files[f"m{number}/modeling_m{number}.py"] = REGULAR
    return write_tree(tmp_path / "models", files)


def start(tree):
    return subprocess.Popen(
        [MIGRATOR, "rewrite", str(tree)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    )


def finish(running):
    errors = running.communicate()[1].decode()
    return running.returncode, errors


def states(tree):
    """Return which files are new; each must be the old or the new one, byte for byte."""
    new = []
    for number in range(MODELS):
        text = (tree / f"m{number}/configuration_m{number}.py").read_text()
        old, migrated = (given.replace("Toy", f"M{number}").lstrip() for given in (PACKED, MIGRATED))
        assert text in (old, migrated)
        new.append(text == migrated)
    return new


def restore(tree):
    for number in range(MODELS):
        path = tree / f"m{number}/configuration_m{number}.py"
        path.write_text(PACKED.replace("Toy", f"M{number}").lstrip())


def killed_at(tree, moment):
    command = [sys.executable, "-c", KILLED, str(tree), str(moment), "rewrite", str(tree)]
    return subprocess.run(command, capture_output=True).returncode


def test_a_kill_leaves_every_file_old_or_new(tree):
    assert finish(start(tree)) == (0, "")
    assert all(states(tree))
    chance, last = random.Random(7), STEPS * MODELS
    for moment in (1, *(chance.randrange(last // 5, last) for _ in range(5)), last):
        restore(tree)
        assert killed_at(tree, moment) == -signal.SIGKILL
        new = states(tree)
        assert not all(new)
        assert any(new) == (moment > 1)
    assert finish(start(tree)) == (0, "")
    assert all(states(tree)), "the next run does the rest"


def test_two_runs_at_once_do_no_harm(tree):
    for _ in range(3):
        restore(tree)
        both = [start(tree), start(tree)]
        ends = [finish(running) for running in both]
        assert all(states(tree))
        for code, errors in ends:
            assert code == 0 or (code == 2 and "changed by someone else" in errors)
            assert "internal error" not in errors
