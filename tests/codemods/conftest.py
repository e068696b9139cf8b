"""A git repository with some of transformers' model folders, made once for a session and copied for each test."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.codemods.repositories import CHILD, MODELS, OFFSPRING, PACKAGE, commit, git


@pytest.fixture(scope="session")
def template(tmp_path_factory, installed_transformers):
    """A repository with a few of transformers' model folders and a class that only inherits from one of them."""
    root = tmp_path_factory.mktemp("repository")
    for name in MODELS:
        shutil.copytree(
            installed_transformers / "models" / name,
            root / PACKAGE / "models" / name,
            ignore=shutil.ignore_patterns("__pycache__"),
        )
    shutil.copy(installed_transformers / "configuration_utils.py", root / PACKAGE)
    (root / PACKAGE / "__init__.py").write_text('__version__ = "5.23.0"\n')
    (root / CHILD).parent.mkdir()
    (root / CHILD).write_text(OFFSPRING)
    modeling = (root / PACKAGE / "models/mixtral/modeling_mixtral.py").read_text()
    (root / CHILD).with_name("modeling_offspring.py").write_text(modeling.replace("MixtralConfig", "OffspringConfig"))
    git(root, "init", "-q")
    commit(root, "as installed")
    return root


@pytest.fixture
def root(template, tmp_path):
    return Path(shutil.copytree(template, tmp_path / "repository"))
