"""`migrator rewrite` killed at any moment, or run twice at once: every file is the old one or the new one."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.codemods.helpers import MIGRATED, PACKED, REGULAR, write_tree

MIGRATOR = str(Path(sys.executable).with_name("migrator"))
MODELS = 120


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
    """Which files are new; each is one of the two, byte for byte."""
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


def test_a_kill_leaves_every_file_old_or_new(tree):
    begun = time.monotonic()
    assert finish(start(tree)) == (0, "")
    took = time.monotonic() - begun
    assert all(states(tree))
    chance, partly, tries = random.Random(7), 0, 0
    while partly < 3 and tries < 60:
        tries += 1
        restore(tree)
        running = start(tree)
        time.sleep(took * chance.uniform(0.4, 1.0))
        running.send_signal(signal.SIGKILL)
        finish(running)
        new = states(tree)
        partly += any(new) and not all(new)
    assert partly, "at least one kill came while files were being written"
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
