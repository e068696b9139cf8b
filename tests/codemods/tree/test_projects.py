"""Paths of several projects in one run: each follows its own configuration, repository and dialect."""

from __future__ import annotations

import json

import pytest

from codemods.tree.projects import group_by_project
from tests.codemods.helpers import PACKED, write_tree
from tests.migrator.source_trees import COPY, OWNER, commit_all, family, git, migrator

OLD = PACKED.replace("packed_colwise", "local_packed_rowwise").replace('"rowwise"', '"local_colwise"')
OLD = OLD.replace("moe_tp_experts", "gather")


def test_paths_of_one_project_stay_together_in_their_order(tmp_path):
    write_tree(tmp_path, {"pyproject.toml": "", "b/x.py": "", "a/y.py": ""})
    paths = [tmp_path / "b", tmp_path / "a/y.py", tmp_path]
    assert group_by_project(paths) == [tuple(paths)]
    assert group_by_project([]) == [()]


@pytest.mark.parametrize("mark", ["pyproject.toml", ".git/config", "src/transformers/__init__.py"])
def test_what_makes_two_projects(tmp_path, mark):
    for name in ("a", "b"):
        write_tree(tmp_path / name, {mark: '__version__ = "5.23.0"\n', "models/x.py": ""})
    a, b = tmp_path / "a", tmp_path / "b"
    assert group_by_project([a, b, a / "models"]) == [(a, a / "models"), (b,)]


def test_a_path_that_no_version_file_speaks_of_goes_with_the_others(tmp_path):
    write_tree(
        tmp_path, {"src/transformers/__init__.py": '__version__ = "5.23.0"\n', "src/transformers/models/x.py": ""}
    )
    write_tree(tmp_path, {"tests/y.py": ""})
    paths = [tmp_path / "tests", tmp_path / "src/transformers/models"]
    assert group_by_project(paths) == [tuple(paths)]


def test_a_path_inside_another_goes_with_it(tmp_path):
    write_tree(tmp_path, {"pyproject.toml": "", "inner/pyproject.toml": "", "inner/x.py": ""})
    paths = [tmp_path / "inner/x.py", tmp_path]
    assert group_by_project(paths) == [tuple(paths)]


@pytest.mark.parametrize("order", [("toy", "heir"), ("heir", "toy")])
def test_models_of_one_folder_go_together_whatever_lies_among_their_files(tmp_path, order):
    family(tmp_path)
    (tmp_path / "heir/pyproject.toml").write_text("[tool.migrator]\n")
    done = migrator("rewrite", *order, "--format", "json", cwd=tmp_path)
    assert {change["path"] for change in json.loads(done.stdout)["changes"]} == {OWNER, COPY}
    (tmp_path / "pyproject.toml").write_text("")
    paths = [tmp_path / "heir", tmp_path / "toy"]
    assert group_by_project(paths) == [(paths[1], paths[0])], (
        "the outermost project comes first, and its settings count"
    )


@pytest.fixture
def two(tmp_path):
    """Two projects: one ignores its plans, the other has them rewritten."""
    for name in ("a", "b"):
        family(tmp_path / name)
    (tmp_path / "a/pyproject.toml").write_text("[tool.migrator]\nignore = ['MIG001']\n")
    (tmp_path / "b/pyproject.toml").write_text("[tool.migrator]\nexclude = ['other']\n")
    return tmp_path


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
def test_each_path_follows_its_own_configuration(two, order):
    done = migrator("check", *order, "--format", "json", cwd=two)
    assert done.returncode == 1
    result = json.loads(done.stdout)
    assert [change["path"] for change in result["changes"]] == [f"b/{OWNER}", f"b/{COPY}"]
    assert result["files"] == 10
    assert migrator("rewrite", *order, cwd=two).returncode == 0
    assert "packed_colwise" in (two / "a" / OWNER).read_text()
    assert "packed_colwise" not in (two / "b" / OWNER).read_text() + (two / "b" / COPY).read_text()


def test_owners_of_all_projects_are_written_before_copies(two):
    (two / "a/pyproject.toml").write_text("")
    result = json.loads(migrator("rewrite", "a", "b", "--format", "json", cwd=two).stdout)
    assert [change["role"] for change in result["changes"]] == ["owner", "owner", "copy", "copy"]


def test_a_mistake_in_one_configuration_stops_the_run(two):
    (two / "b/pyproject.toml").write_text("[tool.migrator]\nignroe = []\n")
    done = migrator("rewrite", "a", "b", cwd=two)
    assert done.returncode == 2
    assert "b/pyproject.toml: tool.migrator.ignroe" in done.stderr.decode()
    assert "packed_colwise" in (two / "b" / OWNER).read_text()


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
def test_each_tree_is_read_in_its_own_dialect(tmp_path, order):
    for name, version, text in (("a", "5.23.0", PACKED), ("b", "4.57.0", OLD)):
        family(tmp_path / name / "src/transformers/models", text)
        write_tree(tmp_path / name, {"src/transformers/__init__.py": f'__version__ = "{version}"\n'})
    done = migrator("rewrite", *order, "--check", "--target", "dtensor", "--format", "json", cwd=tmp_path)
    result = json.loads(done.stdout)
    assert [found["dialect"] for found in result["dialects"]] == [
        {"a": "transformers-5.23", "b": "transformers-4.57"}[name] for name in order
    ]
    assert result["dialect"] is None
    assert not any(found["code"] == "MIG501" for found in result["findings"])
    printed = migrator("check", *order, cwd=tmp_path).stdout.decode()
    assert "read as transformers-4.57" in printed
    assert "read as transformers-5.23" in printed
    assert "MIG501" not in printed


def test_each_repository_is_asked_what_changed_in_it(two):
    for name in ("a", "b"):
        (two / name / "pyproject.toml").write_text("")
        git(two / name, "init", "-q", "-b", "main")
        commit_all(two / name)
    (two / "b/toy/new.py").write_text("x = 1\n")
    done = migrator("check", "a", "b", "--changed-only", "--base-ref", "main", "--format", "json", cwd=two)
    result = json.loads(done.stdout)
    assert {change["path"] for change in result["changes"]} == {f"b/{OWNER}", f"b/{COPY}"}


def test_exclusion_works_through_links(tmp_path):
    family(tmp_path / "elsewhere")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "models").symlink_to(tmp_path / "elsewhere" / ("toy" if name == "a" else "heir"))
        (tmp_path / name / "pyproject.toml").write_text("[tool.migrator]\nexclude = ['models/configuration_toy.py']\n")
    paths = [tmp_path / "a/models", tmp_path / "b/models"]
    assert group_by_project(paths) == [(paths[0],), (paths[1],)]
    done = migrator("rewrite", "a/models", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, b"nothing to rewrite in 1 file\n")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/pyproject.toml").write_text("[tool.migrator]\nexclude = ['toy', 'heir']\n")
    assert b"0 files" in migrator("check", "link", cwd=tmp_path).stdout
