"""The hooks as pre-commit runs them: our package from a git repository, a model tree in another."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.codemods.helpers import MIGRATED
from tests.migrator.source_trees import COPY, OWNER, commit_all, family, git

ROOT = Path(__file__).parents[2]
PACKAGED = ("pyproject.toml", "README.md", ".pre-commit-hooks.yaml", "migrator", "codemods", "plans", "runtime")

pytestmark = pytest.mark.network


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    """Skip what installs packages where there is no index to install them from."""
    folder = tmp_path_factory.mktemp("index")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), "setuptools"]
    done = subprocess.run(command, capture_output=True, check=False, timeout=60)
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
    (root / "README.md").write_text("models\n")
    git(root, "init", "-q")
    commit_all(root)
    return root


@pytest.fixture(scope="module")
def try_hook(hooks, tmp_path_factory):
    """Return a function that runs one hook on what is staged; the environment is built once."""
    store = str(tmp_path_factory.mktemp("store"))

    def run(hook, models):
        git(models, "add", "-A")
        command = [sys.executable, "-m", "pre_commit", "try-repo", str(hooks), hook, "--verbose", "--color", "never"]
        environment = {**os.environ, "PRE_COMMIT_HOME": store}
        return subprocess.run(command, cwd=models, env=environment, capture_output=True, check=False, text=True)

    return run


def unmigrated(path):
    text = path.read_text().replace("moe_tp_gate_up_colwise", "packed_colwise")
    path.write_text(text.replace("moe_tp_down_rowwise", "rowwise"))


def test_the_hooks_work_in_a_real_repository(try_hook, models):
    (models / "README.md").write_text("other\n")
    done = try_hook("migrator-rewrite", models)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Skipped" in done.stdout, "no model file is staged"

    unmigrated(models / OWNER)
    unmigrated(models / COPY)
    commit_all(models)
    (models / "toy/modeling_toy.py").write_text((models / "toy/modeling_toy.py").read_text() + "# touched\n")
    done = try_hook("migrator-check", models)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "toy/configuration_toy.py:3 MIG001" in done.stdout
    assert "heir/configuration_heir.py:4 MIG001" in done.stdout, "the copy is in a folder nobody staged"
    assert "packed_colwise" in (models / OWNER).read_text()

    done = try_hook("migrator-rewrite", models)
    assert done.returncode == 1, "files were modified by this hook"
    assert "files were modified by this hook" in done.stdout
    for name in (OWNER, COPY):
        assert "moe_tp_gate_up_colwise" in (models / name).read_text()

    for hook in ("migrator-rewrite", "migrator-check"):
        done = try_hook(hook, models)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "Passed" in done.stdout
