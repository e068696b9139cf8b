"""Revisions of a real git repository: the files that changed, and links and paths that lead out of it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codemods.comparing.difference import compare
from codemods.comparing.matching import diff_lines
from codemods.files.revisions import find_changed_paths, find_repository
from plans.errors import SourceError, UsageError
from tests.codemods.repositories import MIXTRAL, commit, differences, edit, git


def test_only_what_changed_is_compared(root):
    edit(root, MIXTRAL, '"layers.*.self_attn.q_proj": "colwise"', '"layers.*.self_attn.q_proj": "rowwise"')
    (root / "README.md").write_text("not source\n")
    repository = find_repository(root)
    before, after = repository.read_revision("HEAD"), repository.read_working_tree()
    assert find_changed_paths(before, after) == {Path(MIXTRAL)}
    assert compare(before, after).files == 2


def test_touching_a_file_is_not_a_change(root):
    os.utime(root / MIXTRAL, (1, 1))
    repository = find_repository(root)
    assert find_changed_paths(repository.read_revision("HEAD"), repository.read_working_tree()) == frozenset()


def test_links_are_not_followed_out_of_the_repository(root, tmp_path):
    outside = tmp_path / "configuration_outside.py"
    outside.write_text('class OutsideConfig:\n    base_model_tp_plan = {"secret": "colwise"}\n')
    (root / MIXTRAL).unlink()
    (root / MIXTRAL).symlink_to(outside)
    assert all(one.kind == "removed" for one in differences(root))
    commit(root, "a link")
    assert all(one.kind == "removed" for one in differences(root, "HEAD~1", "HEAD"))


def test_a_tree_that_names_a_path_outside_is_refused(root):
    blob = git(root, "rev-parse", f"HEAD:{MIXTRAL}").strip()
    record = b"100644 configuration_x.py\0" + bytes.fromhex(blob)
    command = ["git", "hash-object", "-t", "tree", "-w", "--literally", "--stdin"]
    inner = subprocess.run(command, cwd=root, input=record, capture_output=True, check=True).stdout.decode().strip()
    outer = b"40000 ..\0" + bytes.fromhex(inner)
    tree = subprocess.run(command, cwd=root, input=outer, capture_output=True, check=True).stdout.decode().strip()
    evil = git(root, "commit-tree", "-m", "evil", tree).strip()
    with pytest.raises(SourceError, match="leads out of the repository"):
        find_repository(root).read_revision(evil)


@pytest.mark.parametrize("name", ["nowhere", "--help", "", "HEAD:src", "HEAD~99"])
def test_unknown_revisions(root, name):
    with pytest.raises(UsageError, match="there is no commit, branch or tag"):
        find_repository(root).read_revision(name)


def test_no_repository(tmp_path):
    with pytest.raises(UsageError, match="not a git repository"):
        find_repository(tmp_path)


LINES = st.lists(st.sampled_from([b"a", b"b", b"c", b"", b"d"]), max_size=12)


@given(LINES, LINES)
def test_without_the_touched_lines_both_texts_are_the_same(old, new):
    removed, added = diff_lines(*(b"".join(line + b"\n" for line in lines) for lines in (old, new)))
    kept_old = [line for number, line in enumerate(old, 1) if number not in removed]
    kept_new = [line for number, line in enumerate(new, 1) if number not in added]
    assert kept_old == kept_new
