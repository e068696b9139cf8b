"""`migrator rewrite` as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.codemods.helpers import MIGRATED, PACKED, REGULAR, write_tree

MIGRATOR = [str(Path(sys.executable).with_name("migrator"))]


def migrator(*arguments, cwd, **keywords):
    return subprocess.run([*MIGRATOR, *map(str, arguments)], cwd=cwd, capture_output=True, check=False, **keywords)


@pytest.fixture
def toy(tmp_path):
    return write_tree(tmp_path, {"toy/configuration_toy.py": PACKED, "toy/modeling_toy.py": REGULAR})


def text_of(toy):
    return (toy / "toy/configuration_toy.py").read_text()


def test_rewrites_and_reports_it(toy):
    done = migrator("rewrite", ".", cwd=toy)
    assert done.returncode == 0
    assert done.stderr == b""
    assert "rewrote toy/configuration_toy.py  2 entries  owner" in done.stdout.decode()
    assert text_of(toy) == MIGRATED.lstrip()
    assert migrator("rewrite", ".", "--check", cwd=toy).returncode == 0


@pytest.mark.parametrize("command", ["rewrite", "check"])
@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("notes.txt", "not a Python file"),
        ("empty", "no Python file below this folder"),
        ("hidden", "no Python file below this folder"),
    ],
)
def test_a_path_without_python_is_refused(toy, command, path, why):
    write_tree(toy, {"notes.txt": "plan", "hidden/.venv/configuration_x.py": PACKED, "empty/notes.txt": ""})
    done = migrator(command, "toy", path, cwd=toy)
    assert (done.returncode, done.stdout) == (2, b"")
    assert f"{path}: {why}" in done.stderr.decode()
    assert migrator(command, cwd=toy / path if (toy / path).is_dir() else toy / "empty").returncode == 2


def test_check_writes_nothing_and_fails(toy):
    done = migrator("rewrite", ".", "--check", cwd=toy)
    assert done.returncode == 1
    assert text_of(toy) == PACKED.lstrip()


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("end", ["", "\n"])
def test_git_applies_the_diff(toy, newline, end):
    path = toy / "toy/configuration_toy.py"
    path.write_bytes((PACKED.strip() + end).replace("\n", newline).encode())
    (toy / "a b").mkdir()
    write_tree(toy, {"a b/configuration_x.py": PACKED, "a b/modeling_x.py": REGULAR})
    done = migrator("rewrite", ".", "--diff", cwd=toy)
    assert done.returncode == 0
    assert "packed" in path.read_text()
    subprocess.run(["git", "init", "-q"], cwd=toy, check=True)
    subprocess.run(["git", "apply", "--whitespace=nowarn", "-"], cwd=toy, input=done.stdout, check=True)
    assert path.read_bytes() == (MIGRATED.strip() + end).replace("\n", newline).encode()
    assert migrator("rewrite", ".", "--check", cwd=toy).returncode == 0


def test_json_is_nothing_but_json(toy):
    done = migrator("rewrite", ".", "--check", "--format", "json", cwd=toy)
    result = json.loads(done.stdout)
    assert result["written"] is False
    assert [edit["code"] for edit in result["changes"][0]["edits"]] == ["MIG001", "MIG002"]
    assert result["changes"][0]["path"] == "toy/configuration_toy.py"


def test_a_tree_without_plans_is_not_an_error(tmp_path):
    (tmp_path / "x.py").write_text("x = 1\n")
    done = migrator("rewrite", ".", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, b"no plans found in 1 file\n")


def test_no_such_path(tmp_path):
    done = migrator("rewrite", "nowhere", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == b""
    assert done.stderr.decode().splitlines() == [
        "error: nowhere: no such file or folder",
        "hint: name files or folders that exist",
    ]


def test_one_bad_file_is_named_and_the_others_done(toy):
    write_tree(toy, {"bad/configuration_bad.py": PACKED.replace("}", "")})
    done = migrator("rewrite", ".", cwd=toy)
    assert done.returncode == 2
    assert "bad/configuration_bad.py:" in done.stderr.decode()
    assert "Traceback" not in done.stderr.decode()
    assert text_of(toy) == MIGRATED.lstrip()


def test_bad_usage_is_2(tmp_path):
    assert migrator("rewrite", "--frob", cwd=tmp_path).returncode == 2
    assert migrator("frobnicate", cwd=tmp_path).returncode == 2


def test_rewriting_imports_neither_torch_nor_transformers(toy):
    code = (
        "import sys; sys.argv = ['migrator', 'rewrite', '.'];"
        "from migrator.cli import main\n"
        "try: main()\n"
        "finally: assert not {'torch', 'transformers', 'numpy'} & set(sys.modules), sorted(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=toy, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
