"""The hooks as pre-commit runs them: our package from a git repository, a model tree in another."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.codemods.helpers import MIGRATED
from tests.migrator.source_trees import COPY, OWNER, commit_all, family, git
from tests.waiting import HANG_TIMEOUT

ROOT = Path(__file__).parents[2]
PACKAGED = ("pyproject.toml", "README.md", ".pre-commit-hooks.yaml", "migrator", "codemods", "plans", "runtime")


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    """Skip what installs packages where there is no index to install them from."""
    folder = tmp_path_factory.mktemp("index")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), "setuptools"]
    done = subprocess.run(command, capture_output=True, check=False, timeout=HANG_TIMEOUT)
    if done.returncode:
        pytest.skip("offline: the package index cannot be reached")


@pytest.fixture(scope="module")
def hooks(tmp_path_factory, index):
    """A git repository with our package in it."""
    root = tmp_path_factory.mktemp("hooks")
    for name in PACKAGED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, root / name)
    git(root, "init", "-q")
    commit_all(root)
    return root


@pytest.fixture
def models(tmp_path):
    """A git repository of models whose plans are migrated already."""
    root = tmp_path / "models"
    root.mkdir()
    family(root, MIGRATED)
    git(root, "init", "-q")
    commit_all(root)
    return root


def try_repo(hooks, models):
    """Run the hooks, by their names, on what is staged; pre-commit builds an environment for each call."""
    command = [sys.executable, "-m", "pre_commit", "try-repo", str(hooks), "--verbose", "--color", "never"]
    environment = {**os.environ, "PRE_COMMIT_HOME": str(models.parent / "store")}
    return subprocess.run(command, cwd=models, env=environment, capture_output=True, check=False, text=True)


def unmigrated(path):
    text = path.read_text().replace("moe_tp_gate_up_colwise", "packed_colwise")
    path.write_text(text.replace("moe_tp_down_rowwise", "rowwise"))


@pytest.mark.network
def test_the_hooks_work_in_a_real_repository(hooks, models):
    unmigrated(models / OWNER)
    unmigrated(models / COPY)
    commit_all(models)
    (models / "toy/modeling_toy.py").write_text((models / "toy/modeling_toy.py").read_text() + "# touched\n")
    git(models, "add", "-A")

    done = try_repo(hooks, models)
    assert done.returncode == 1, done.stdout + done.stderr
    checking, rewriting = done.stdout.split("\nmigrator rewrite")
    assert "toy/configuration_toy.py:3 MIG001" in checking
    assert "heir/configuration_heir.py:4 MIG001" in checking, "the copy is in a folder nobody staged"
    assert "files were modified by this hook" in rewriting
    for name in (OWNER, COPY):
        assert "moe_tp_gate_up_colwise" in (models / name).read_text()

    git(models, "add", "-A")
    done = try_repo(hooks, models)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("Passed") == 2


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("src/models/toy/configuration_toy.py", True),
        ("modular_toy.py", True),
        ("toy/modeling_toy.py", True),
        ("README.md", False),
        ("toy/tokenization_toy.py", False),
        ("toy/test_modeling_toy.py", False),
        ("modeling_toy.pyi", False),
    ],
)
def test_what_is_staged_decides_whether_a_hook_runs(path, expected):
    for hook in yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text()):
        assert (re.search(hook["files"], path) is not None) is expected
        assert hook["require_serial"] is True
        assert hook["pass_filenames"] is False
