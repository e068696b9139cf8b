"""`[tool.migrator]` is read from the nearest pyproject.toml, and mistakes are reported with their keys."""

from __future__ import annotations

from pathlib import Path

import pytest

from codemods.files.config import Configuration, find_configuration, read_configuration
from plans.errors import UsageError


def configured(folder: Path, text: str) -> Configuration:
    (folder / "pyproject.toml").write_text(text, encoding="utf-8")
    return find_configuration(folder)


def test_every_setting_is_read(tmp_path):
    found = configured(
        tmp_path,
        """
        [tool.migrator]
        paths = ["src/models"]
        target = "param-level"
        source = "auto"
        ignore = ["MIG101"]
        exclude = ["**/old/*"]
        [tool.migrator.per-path-ignores]
        "src/models/llama4" = ["MIG001", "MIG002"]
        """,
    )
    assert found == Configuration(
        tmp_path,
        (tmp_path / "src/models",),
        "param-level",
        "auto",
        frozenset({"MIG101"}),
        (("src/models/llama4", frozenset({"MIG001", "MIG002"})),),
        ("**/old/*",),
    )


def test_the_nearest_project_is_found_for_files_too(tmp_path):
    configured(tmp_path, "[tool.migrator]\nignore = ['MIG101']\n")
    inner = tmp_path / "a/b"
    inner.mkdir(parents=True)
    (inner / "x.py").write_text("")
    assert find_configuration(inner / "x.py").ignore == {"MIG101"}
    (tmp_path / "a/pyproject.toml").write_text("[project]\nname = 'a'\n")
    assert find_configuration(inner) == Configuration(tmp_path / "a")


@pytest.mark.parametrize("text", ["", "[tool.ruff]\nline-length = 1\n", "tool = 3\n", "# migrator\n"])
def test_a_file_without_the_table_gives_no_settings(tmp_path, text):
    assert configured(tmp_path, text) == Configuration(tmp_path)


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ("patsh = []", "patsh"),
        ("paths = 'src'", "paths"),
        ("paths = [1]", "paths"),
        ("paths = ['../elsewhere']", "paths"),
        ("paths = ['/']", "paths"),
        ("target = 3", "target"),
        ("source = ['auto']", "source"),
        ("ignore = 'MIG001'", "ignore"),
        ("ignore = ['MIG999']", "ignore"),
        ("ignore = ['']", "ignore"),
        ("per-path-ignores = ['MIG001']", "per-path-ignores"),
        ("per-path-ignores = {'a.py' = 'MIG001'}", "per-path-ignores"),
        ("exclude = {}", "exclude"),
    ],
)
def test_a_mistake_names_the_key_and_the_file(tmp_path, line, key):
    with pytest.raises(UsageError) as caught:
        configured(tmp_path, f"[tool.migrator]\n{line}\n")
    assert f"pyproject.toml: tool.migrator.{key}" in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.hint
    assert caught.value.data["path"] == str(tmp_path / "pyproject.toml")


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("excludes = []", "did you mean exclude? settings are paths, target, "),
        ("per_path_ignores = {}", "did you mean per-path-ignores? settings are "),
        ("quiet = true", "settings are paths, "),
        ("ignore = ['mig001']", "did you mean MIG001? `migrator explain` lists"),
    ],
)
def test_a_similar_name_is_suggested(tmp_path, line, hint):
    with pytest.raises(UsageError) as caught:
        configured(tmp_path, f"[tool.migrator]\n{line}\n")
    assert caught.value.hint.startswith(hint)


@pytest.mark.parametrize("data", [b"[tool.migrator\n", b"# migrator \xff\n", b"[tool]\nmigrator = 3\n"])
def test_invalid_toml_is_refused(tmp_path, data):
    path = tmp_path / "pyproject.toml"
    path.write_bytes(data)
    with pytest.raises(UsageError, match=r"pyproject\.toml"):
        read_configuration(path)


def test_paths_that_lead_out_through_a_link_are_refused(tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "project").mkdir()
    (tmp_path / "project/models").symlink_to(tmp_path / "outside")
    with pytest.raises(UsageError, match="leads out of the project"):
        configured(tmp_path / "project", "[tool.migrator]\npaths = ['models']\n")


@pytest.mark.parametrize(
    ("glob", "path", "expected"),
    [
        ("old", "src/old/x.py", True),
        ("old/", "src/old/x.py", False),
        ("src/old", "src/old/deep/x.py", True),
        ("modeling_*.py", "src/a/modeling_a.py", True),
        ("src/*.py", "src/a/x.py", False),
        ("src/**/x.py", "src/x.py", True),
        ("src/**/x.py", "src/a/b/x.py", True),
        ("src/?.py", "src/x.py", True),
        ("*.p", "src/x.py", False),
        ("a+b", "a+b/x.py", True),
        ("./src/old", "src/old/x.py", True),
        ("./old", "src/old/x.py", False),
        ("./x.py", "x.py", True),
    ],
)
def test_globs(tmp_path, glob, path, expected):
    assert Configuration(tmp_path, exclude=(glob,)).is_included(tmp_path / path) is not expected


def test_a_file_outside_the_root_is_matched_by_its_whole_path(tmp_path):
    assert Configuration(tmp_path, exclude=("src/*",)).is_included(Path("/other/src/x.py"))


def test_the_excluding_glob_is_returned(tmp_path):
    configuration = Configuration(tmp_path, exclude=("old", "./src/*.py"))
    assert configuration.find_exclude_pattern(tmp_path / "src/x.py") == "./src/*.py"
    assert configuration.find_exclude_pattern(tmp_path / "x.py") is None


@pytest.mark.parametrize("link", ["project", "project/src", "project/src/x.py"])
def test_a_link_is_followed_into_its_project(tmp_path, link):
    root = tmp_path / "real/project"
    (root / "src").mkdir(parents=True)
    (root / "src/x.py").write_text("")
    configured(root, "[tool.migrator]\nexclude = ['src/x.py']\n")
    (tmp_path / "link").symlink_to(tmp_path / "real" / link)
    found = find_configuration(tmp_path / "link")
    assert found.root == root
    assert found.find_exclude_pattern(root / "src/x.py")


def test_a_link_out_of_every_project_belongs_to_the_project_that_contains_it(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "project").mkdir()
    (tmp_path / "project/models").symlink_to(tmp_path / "elsewhere")
    configured(tmp_path / "project", "[tool.migrator]\nexclude = ['models/old']\n")
    found = find_configuration(tmp_path / "project/../project/models")
    assert found.find_exclude_pattern(tmp_path / "elsewhere/old/x.py") == "models/old"
    assert found.find_exclude_pattern(tmp_path / "elsewhere/new/x.py") is None
