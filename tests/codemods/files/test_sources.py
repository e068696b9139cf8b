"""Finding source files: nested folders, order, links and irregular files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from codemods.files.sources import find_sources
from codemods.rewriting.migrate import plan_rewrites
from plans.errors import SourceError, UsageError
from tests.codemods.helpers import PACKED, REGULAR, write_tree

DEPTH = 1100
TOO_LONG = 25


@pytest.fixture
def deep(tmp_path):
    """A model in a folder nested deeper than the recursion limit; it is removed step by step."""
    folders = [tmp_path]
    for _ in range(DEPTH):
        folders.append(folders[-1] / "d")
        folders[-1].mkdir()
    write_tree(folders[-1], {"toy/configuration_toy.py": PACKED, "toy/modeling_toy.py": REGULAR})
    yield folders[-1] / "toy"
    for path in (folders[-1] / "toy").iterdir():
        path.unlink()
    (folders[-1] / "toy").rmdir()
    for folder in reversed(folders[1:]):
        folder.rmdir()


def test_folders_may_be_nested_deeper_than_calls(tmp_path, deep):
    assert find_sources([tmp_path], []) == [deep / "configuration_toy.py", deep / "modeling_toy.py"]


def test_a_plan_in_a_deep_folder_is_rewritten(tmp_path, deep):
    outcome = plan_rewrites([tmp_path])
    assert outcome.errors == ()
    assert [change.path for change in outcome.changes] == [deep / "configuration_toy.py"]


def test_files_are_sorted_and_unique(tmp_path):
    write_tree(tmp_path, {"b/one.py": "", "a/two.py": "", "a.py": "", "a/deep/three.py": "", "c.txt": ""})
    found = [
        str(path.relative_to(tmp_path)) for path in find_sources([tmp_path, tmp_path / "a", tmp_path / "a.py"], [])
    ]
    assert found == ["a.py", "a/deep/three.py", "a/two.py", "b/one.py"]


def test_hidden_and_irregular_files_are_skipped(tmp_path):
    write_tree(tmp_path, {".git/one.py": "", "__pycache__/two.py": "", "node_modules/x/three.py": "", "a/.four.py": ""})
    os.mkfifo(tmp_path / "pipe.py")
    (tmp_path / "folder.py").mkdir()
    assert find_sources([tmp_path], []) == []


def test_links_to_files_outside_the_paths_are_returned_once(tmp_path):
    root = write_tree(tmp_path / "in", {"toy/one.py": ""})
    write_tree(tmp_path / "out", {"two.py": "", "three.txt": ""})
    (root / "inner.py").symlink_to(root / "toy/one.py")
    (root / "broken.py").symlink_to(tmp_path / "gone.py")
    (root / "itself.py").symlink_to(root / "itself.py")
    (root / "text.md").symlink_to(tmp_path / "out/three.txt")
    (root / "folder").symlink_to(tmp_path / "out")
    (root / "toy/outer.py").symlink_to(tmp_path / "out/two.py")
    links: list[Path] = []
    assert find_sources([root, root / "toy"], [], links) == [root / "toy/one.py"]
    assert links == [root / "toy/outer.py"]


def test_an_unreadable_folder_does_not_stop_the_others(tmp_path):
    write_tree(tmp_path, {"a/one.py": "", "z/two.py": ""})
    names = ["b", *["n" * 200] * TOO_LONG]  # longer than a path may be
    folder = os.open(tmp_path, os.O_RDONLY)
    for name in names:
        os.mkdir(name, dir_fd=folder)
        inner = os.open(name, os.O_RDONLY, dir_fd=folder)
        os.close(folder)
        folder = inner
    os.close(folder)
    unreadable: list = []
    assert [path.name for path in find_sources([tmp_path], unreadable)] == ["one.py", "two.py"]
    assert [(type(error), str(error).endswith("File name too long")) for error in unreadable] == [(SourceError, True)]


def test_a_path_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(UsageError, match="no such file or folder"):
        find_sources([tmp_path / "gone"], [])
