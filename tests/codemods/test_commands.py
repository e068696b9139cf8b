"""The LibCST command, in LibCST's own runner and alone."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import libcst as cst
import pytest
from libcst.codemod import CodemodContext, SkipFile

from codemods.commands import DecomposePlansCommand
from codemods.rewriting.migrate import plan_rewrites
from codemods.rewriting.write import write_changes
from tests.codemods.helpers import MIGRATED, PACKED, REGULAR, write_tree

MODELS = ("mixtral", "qwen3_moe", "mellum", "gemma4", "llama4", "llama")


DOC = (Path(__file__).parents[2] / "docs" / "rewriting.md").read_text("utf-8")


def run_codemod(folder):
    """Run the very command that docs/rewriting.md shows."""
    shown = re.search(r"`python (-m libcst\.tool .+) PATH`", DOC)
    assert shown is not None
    command = [sys.executable, *shown[1].split(), "--hide-progress", folder.name]
    return subprocess.run(command, cwd=folder.parent, capture_output=True, check=False)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*.py"))}


def test_the_real_runner_writes_what_rewrite_writes(tmp_path, installed_transformers):
    for name in MODELS:
        for file in sorted((installed_transformers / "models" / name).glob("[cm]o[nd]*_*.py")):
            for tree in ("one", "other"):
                (tmp_path / tree / name).mkdir(parents=True, exist_ok=True)
                shutil.copy(file, tmp_path / tree / name)
    before = contents(tmp_path / "one")
    done = run_codemod(tmp_path / "one")
    assert done.returncode == 0, done.stderr.decode()
    assert b"MIG101" in done.stderr, "llama4 is transposed, and the runner shows our warning"
    assert write_changes(plan_rewrites([tmp_path / "other"]).changes).errors == ()
    after = contents(tmp_path / "one")
    assert after == contents(tmp_path / "other")
    assert {path.parent.name for path in after if after[path] != before[path]} == set(MODELS) - {"llama4", "llama"}


def transformed(folder, text):
    write_tree(folder, {"toy/configuration_toy.py": text, "toy/modeling_toy.py": REGULAR})
    path = folder / "toy/configuration_toy.py"
    context = CodemodContext(filename=str(path))
    return DecomposePlansCommand(context).transform_module(cst.parse_module(path.read_bytes())).code, context


def test_one_module(tmp_path):
    code, context = transformed(tmp_path, PACKED)
    assert code == MIGRATED.lstrip()
    assert context.warnings == []
    assert transformed(tmp_path, code)[0] == code, "twice is the same as once"


def test_newlines_and_an_encoding_stay(tmp_path):
    text = "# coding: latin-1\r\n# é\r\n" + PACKED.lstrip().replace("\n", "\r\n")
    write_tree(tmp_path, {"toy/modeling_toy.py": REGULAR})
    context = CodemodContext(filename=str(tmp_path / "toy/configuration_toy.py"))
    result = DecomposePlansCommand(context).transform_module(cst.parse_module(text.encode("latin-1")))
    expected = "# coding: latin-1\r\n# é\r\n" + MIGRATED.lstrip().replace("\n", "\r\n")
    assert result.bytes == expected.encode("latin-1")


def test_an_ignore_comment_keeps_an_entry(tmp_path):
    text = PACKED.replace('"packed_colwise",', '"packed_colwise",  # migrator: ignore[MIG001]')
    assert transformed(tmp_path, text)[0] == text.lstrip()


def test_without_a_file_name_nothing_is_guessed():
    command = DecomposePlansCommand(CodemodContext())
    with pytest.raises(SkipFile, match="the context has no file name"):
        command.transform_module(cst.parse_module(PACKED))


def test_libcst_is_imported_only_to_edit(tmp_path):
    files = {"toy/configuration_toy.py": PACKED, "toy/modeling_toy.py": REGULAR}
    for folder, text, imported in (("before", PACKED, True), ("after", MIGRATED, False)):
        write_tree(tmp_path / folder, files | {"toy/configuration_toy.py": text})
        code = (
            "import sys, pathlib, codemods.rewriting.migrate as m; m.plan_rewrites([pathlib.Path()]);"
            f"assert ('libcst' in sys.modules) == {imported}"
        )
        subprocess.run([sys.executable, "-c", code], cwd=tmp_path / folder, check=True)
