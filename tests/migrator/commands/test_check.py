"""`migrator check` as a user runs it."""

from __future__ import annotations

import json

import pytest

from tests.codemods.helpers import MIGRATED, PACKED, write_tree
from tests.migrator.source_trees import COPY, MODELING, OWNER, commit_all, family, git, migrator, texts

TRANSPOSED = MODELING.replace(
    "2 * self.intermediate_dim, self.hidden_dim", "self.hidden_dim, 2 * self.intermediate_dim"
).replace("self.hidden_dim, self.intermediate_dim))", "self.intermediate_dim, self.hidden_dim))")


def test_pending_rewrites_are_findings_and_nothing_is_written(tmp_path):
    before = texts(family(tmp_path))
    done = migrator("check", ".", cwd=tmp_path)
    assert done.returncode == 1
    lines = done.stdout.decode().splitlines()
    assert lines[0] == (
        "warning heir/configuration_heir.py:4 MIG001 layers.*.mlp.experts.gate_up_proj: "
        "packed_colwise becomes moe_tp_gate_up_colwise"
    )
    assert "MIG001: run `migrator rewrite`" in lines
    assert lines[-1] == "4 warnings in 5 files"
    assert done.stderr == b""
    assert texts(tmp_path) == before


def test_a_migrated_tree_is_clean(tmp_path):
    done = migrator("check", ".", cwd=family(tmp_path, MIGRATED))
    assert (done.returncode, done.stdout) == (0, b"nothing found in 5 files\n")


def test_notes_never_fail(tmp_path):
    done = migrator("check", ".", cwd=write_tree(tmp_path, {OWNER: PACKED, "toy/modeling_toy.py": TRANSPOSED}))
    assert done.returncode == 0
    assert done.stdout.decode().startswith("note toy/configuration_toy.py:3 MIG101")


def test_a_defect_fails_check_but_not_rewrite(tmp_path):
    write_tree(tmp_path, {OWNER: PACKED})
    assert migrator("check", ".", cwd=tmp_path).returncode == 1
    assert migrator("rewrite", ".", cwd=tmp_path).returncode == 0


def test_a_bad_file_is_2_and_the_others_are_still_checked(tmp_path):
    write_tree(family(tmp_path), {"bad/configuration_bad.py": PACKED.replace("}", "")})
    done = migrator("check", ".", cwd=tmp_path)
    assert done.returncode == 2
    assert b"MIG001" in done.stdout
    assert b"bad/configuration_bad.py:" in done.stderr


def test_quiet_prints_errors_only(tmp_path):
    done = migrator("check", ".", "--quiet", cwd=family(tmp_path))
    assert (done.returncode, done.stdout, done.stderr) == (1, b"", b"")


def test_an_unused_ignore_fails_and_a_used_one_does_not(tmp_path):
    comment = '"packed_colwise",  # migrator: ignore[MIG001]'
    write_tree(tmp_path, {OWNER: PACKED.replace('"packed_colwise",', comment), "toy/modeling_toy.py": MODELING})
    done = migrator("check", ".", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, b"nothing found in 2 files\n")
    text = (tmp_path / OWNER).read_text().replace("packed_colwise", "moe_tp_gate_up_colwise")
    (tmp_path / OWNER).write_text(text.replace('"rowwise"', '"moe_tp_down_rowwise"'))
    done = migrator("check", ".", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stdout.decode().startswith("warning toy/configuration_toy.py:3 MIG901 nothing here is MIG001")


def test_a_bare_ignore_is_an_error(tmp_path):
    write_tree(tmp_path, {OWNER: MIGRATED + "# migrator: ignore\nx = 1\n", "toy/modeling_toy.py": MODELING})
    done = migrator("check", ".", cwd=tmp_path)
    assert done.returncode == 1
    assert b"error toy/configuration_toy.py:7 MIG902" in done.stdout


def test_the_configuration_selects_paths_and_rules(tmp_path):
    family(tmp_path / "src")
    family(tmp_path / "legacy")
    (tmp_path / "pyproject.toml").write_text("[tool.migrator]\npaths = ['src']\nexclude = ['heir/configuration_*']\n")
    assert b"legacy" not in migrator("check", cwd=tmp_path).stdout
    assert b"legacy" in migrator("check", "legacy", cwd=tmp_path).stdout, "the command line wins"
    (tmp_path / "pyproject.toml").write_text("[tool.migrator]\nignore = ['MIG001']\n")
    assert migrator("check", cwd=tmp_path).returncode == 0
    assert migrator("rewrite", "--check", cwd=tmp_path).returncode == 0


def test_the_dialect_is_detected_or_given(tmp_path):
    style = MIGRATED.replace('"layers.*.mlp.experts": "moe_tp_experts"', '"layers.*.self_attn.q_proj": "local_colwise"')
    family(tmp_path, style)
    (tmp_path / "__init__.py").write_text('__version__ = "5.23.0"\n')
    assert migrator("check", cwd=tmp_path).returncode == 0, "an older dialect has the style"
    assert b"MIG501" in migrator("check", "--source", "transformers-5.23", cwd=tmp_path).stdout
    (tmp_path / "pyproject.toml").write_text("[tool.migrator]\nsource = 'transformers-5.23'\n")
    assert b"MIG501" in migrator("check", cwd=tmp_path).stdout
    (tmp_path / "pyproject.toml").write_text("[tool.migrator]\nsource = 'klingon'\n")
    done = migrator("check", cwd=tmp_path)
    assert done.returncode == 2
    assert b"there is no dialect 'klingon'" in done.stderr
    assert b"MIG501" in migrator("check", "--source", "transformers-5.23", cwd=tmp_path).stdout, "the command line wins"


def test_the_target_is_configured_or_given(tmp_path):
    family(tmp_path)
    (tmp_path / "pyproject.toml").write_text("[tool.migrator]\ntarget = 'dtensor'\n")
    flags = ("--check", "--format", "json", "--source", "transformers-5.23")
    result = json.loads(migrator("rewrite", *flags, cwd=tmp_path).stdout)
    assert result["dialect"] == {"dialect": "transformers-5.23", "reason": "asked for", "alternatives": []}
    styles = [edit["style"] for edit in result["changes"][0]["edits"]]
    assert styles == ["moe_tp_gate_up_colwise", "moe_tp_down_rowwise", "moe_experts_allreduce"]
    result = json.loads(migrator("rewrite", *flags, "--target", "param-level", cwd=tmp_path).stdout)
    styles = [edit["style"] for edit in result["changes"][0]["edits"]]
    assert styles == ["moe_tp_gate_up_colwise", "moe_tp_down_rowwise"]
    printed = migrator("rewrite", "--check", cwd=tmp_path).stdout.decode()
    assert "read as " in printed
    assert migrator("rewrite", "--target", "klingon", cwd=tmp_path).returncode == 2
    assert migrator("check", "--target", "klingon", cwd=tmp_path).returncode == 2


def test_the_target_decides_what_is_pending(tmp_path):
    family(tmp_path)
    flags = ("--source", "transformers-5.23")
    printed = migrator("check", "--target", "dtensor", *flags, cwd=tmp_path).stdout.decode().splitlines()
    assert printed[2].endswith("MIG400 layers.*.mlp.experts: moe_tp_experts becomes moe_experts_allreduce")
    assert printed[-1] == "6 warnings in 5 files"
    assert migrator("rewrite", "--target", "dtensor", *flags, cwd=tmp_path).returncode == 0
    (tmp_path / "pyproject.toml").write_text("[tool.migrator]\ntarget = 'dtensor'\n")
    done = migrator("check", "--source", "dtensor", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, b"nothing found in 5 files\n")


@pytest.mark.parametrize("command", ["check", "rewrite"])
@pytest.mark.parametrize("configured", [True, False])
def test_an_overlay_is_not_a_source(tmp_path, command, configured):
    before = texts(family(tmp_path))
    if configured:
        (tmp_path / "pyproject.toml").write_text("[tool.migrator]\nsource = 'param-level'\n")
    done = migrator(command, *(() if configured else ("--source", "param-level")), cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, b"")
    message, hint = done.stderr.decode().splitlines()
    assert message.startswith("error: no tree uses param-level alone")
    assert "transformers-5.23" in hint
    assert "param-level" not in hint
    assert texts(tmp_path) == before


@pytest.mark.parametrize("command", ["check", "rewrite"])
def test_a_mistake_in_the_configuration_is_2(tmp_path, command):
    before = texts(family(tmp_path))
    (tmp_path / "pyproject.toml").write_text("[tool.migrator]\nignroe = ['MIG001']\n")
    done = migrator(command, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, b"")
    message = (
        "error: pyproject.toml: tool.migrator.ignroe is not a setting\nhint: did you mean ignore? settings are paths, "
    )
    assert done.stderr.decode().startswith(message)
    assert texts(tmp_path) == before


def test_changed_only_reports_changed_models(tmp_path):
    family(tmp_path)
    git(tmp_path, "init", "-q", "-b", "main")
    commit_all(tmp_path)
    flags = ("--changed-only", "--base-ref", "main")
    assert migrator("check", ".", *flags, cwd=tmp_path).returncode == 0
    assert migrator("rewrite", ".", *flags, cwd=tmp_path).returncode == 0
    assert b"packed_colwise" in (tmp_path / OWNER).read_bytes()
    (tmp_path / "heir/new.py").write_text("x = 1\n")
    assert migrator("check", ".", *flags, cwd=tmp_path).returncode == 1
    assert migrator("rewrite", ".", *flags, cwd=tmp_path).returncode == 0
    assert b"packed_colwise" not in (tmp_path / OWNER).read_bytes() + (tmp_path / COPY).read_bytes()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--changed-only"], "not a git repository"),
        (["--base-ref", "main"], "--base-ref needs --changed-only"),
    ],
)
def test_changed_only_that_cannot_work_is_2(tmp_path, flags, message):
    done = migrator("check", ".", *flags, cwd=family(tmp_path))
    assert done.returncode == 2
    assert message in done.stderr.decode()


def test_json_has_the_documented_shape(tmp_path):
    write_tree(
        family(tmp_path), {"bad/configuration_bad.py": PACKED.replace("}", ""), "odd/configuration_odd.py": PACKED}
    )
    done = migrator("check", ".", "--format", "json", cwd=tmp_path)
    result = json.loads(done.stdout)
    assert set(result) == {"written", "files", "plan_files", "dialect", "dialects", "changes", "findings", "errors"}
    assert [change["role"] for change in result["changes"]] == ["owner", "copy"]
    assert result["changes"][0]["edits"][0] == {
        "line": 3,
        "class": "ToyConfig",
        "plan": "base_model_tp_plan",
        "code": "MIG001",
        "severity": "warning",
        "key": "layers.*.mlp.experts.gate_up_proj",
        "before": "packed_colwise",
        "style": "moe_tp_gate_up_colwise",
        "message": "layers.*.mlp.experts.gate_up_proj: packed_colwise becomes moe_tp_gate_up_colwise",
    }
    assert [(found["path"], found["code"], found["severity"]) for found in result["findings"]] == [
        ("odd/configuration_odd.py", "MIG203", "warning")
    ]
    assert [set(error) for error in result["errors"]] == [{"kind", "message", "hint", "path", "line"}]
