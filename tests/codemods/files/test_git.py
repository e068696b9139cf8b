"""The files that changed on a branch, in real git repositories."""

from __future__ import annotations

import subprocess

import pytest

from codemods.files.git import find_changed_folders, list_changed_files
from codemods.rewriting.migrate import plan_rewrites
from codemods.tree.selection import Selection, Suppressions
from plans.errors import DependencyError, UsageError
from tests.migrator.source_trees import COPY, OWNER, commit_all, family, git


@pytest.fixture
def repository(tmp_path):
    """A repository with a branch, and with a later commit on main."""
    root = tmp_path / "repository"
    root.mkdir()
    family(root)
    for name in ("kept", "deleted", "edited", "on_main"):
        (root / f"{name}.py").write_text("x = 1\n")
    (root / ".gitignore").write_text("ignored.py\n")
    git(root, "init", "-q", "-b", "main")
    commit_all(root)
    git(root, "checkout", "-q", "-b", "branch")
    (root / "committed.py").write_text("x = 1\n")
    (root / "deleted.py").unlink()
    commit_all(root)
    git(root, "checkout", "-q", "main")
    (root / "on_main.py").write_text("x = 2\n")
    commit_all(root)
    git(root, "checkout", "-q", "branch")
    return root


def names(root, base="main", folder=None):
    return {str(path.relative_to(root.resolve())) for path in list_changed_files(base, folder or root)}


def test_commits_index_working_tree_and_new_files_are_listed(repository):
    assert names(repository) == {"committed.py", "deleted.py"}
    (repository / "edited.py").write_text("x = 2\n")
    (repository / "staged.py").write_text("x = 2\n")
    git(repository, "add", "staged.py")
    (repository / "caf\u00e9 new.py").write_text("x = 2\n")
    (repository / "ignored.py").write_text("x = 2\n")
    assert names(repository) == {"committed.py", "deleted.py", "edited.py", "staged.py", "caf\u00e9 new.py"}


def test_any_folder_of_the_repository_and_any_kind_of_ref_is_accepted(repository):
    assert names(repository, folder=repository / "toy") == {"committed.py", "deleted.py"}
    assert names(repository, base=git(repository, "rev-parse", "main").strip()) == {"committed.py", "deleted.py"}
    assert names(repository, base="HEAD") == set()


def test_an_unknown_ref_is_refused(repository):
    for ref in ("nowhere", "--output=x", ""):
        with pytest.raises(UsageError) as caught:
            list_changed_files(ref, repository)
        assert repr(ref) in caught.value.message
        assert "fetch" in caught.value.hint
    assert not (repository / "x").exists()


def test_histories_without_a_common_commit_are_refused(repository):
    git(repository, "checkout", "-q", "--orphan", "other")
    commit_all(repository)
    with pytest.raises(UsageError, match="no commit in common"):
        list_changed_files("main", repository)


def test_a_folder_outside_any_repository_is_refused(tmp_path):
    with pytest.raises(UsageError, match="not a git repository"):
        list_changed_files("main", tmp_path)


def test_git_must_be_installed(repository, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(DependencyError):
        list_changed_files("main", repository)


def test_programs_in_the_repository_settings_are_not_started(repository):
    program = repository.parent / "program.sh"
    program.write_text(f"#!/bin/sh\ntouch {repository.parent}/started\n")
    program.chmod(0o755)
    git(repository, "config", "core.fsmonitor", str(program))
    git(repository, "config", "diff.external", str(program))
    (repository / "edited.py").write_text("x = 2\n")
    assert "edited.py" in names(repository)
    assert not (repository.parent / "started").exists()
    subprocess.run(["git", "status"], cwd=repository, capture_output=True, check=False)
    assert (repository.parent / "started").exists(), "without our settings git would have started it"


def outcome_of(root):
    touched = find_changed_folders(list_changed_files("main", root))
    return plan_rewrites([root], Suppressions(Selection(changed_folders=touched)))


def test_only_models_with_a_changed_file_are_in_scope(repository):
    assert outcome_of(repository).changes == ()


@pytest.mark.parametrize("touched", [OWNER, COPY, "toy/modeling_toy.py", "heir/modular_heir.py"])
def test_one_changed_file_brings_its_whole_family_into_scope(repository, touched):
    path = repository / touched
    path.write_text(path.read_text() + "# changed\n")
    assert {str(change.path.relative_to(repository)) for change in outcome_of(repository).changes} == {OWNER, COPY}
