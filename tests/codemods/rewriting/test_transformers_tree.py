"""The whole models folder of the installed transformers, the tree this tool is for."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest

from codemods.rewriting.migrate import plan_rewrites
from codemods.rewriting.write import write_changes

EXPERTS = re.compile(r"(?:.*\.)?experts\.(gate_up_proj|down_proj|up_proj)")


@pytest.fixture(scope="module")
def tree(tmp_path_factory, installed_transformers):
    copy = tmp_path_factory.mktemp("transformers") / "models"
    shutil.copytree(installed_transformers / "models", copy, ignore=shutil.ignore_patterns("__pycache__"))
    for arguments in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "as installed"]):
        git(copy, *arguments)
    before = all_plans(copy)
    outcome = plan_rewrites([copy])
    assert write_changes(outcome.changes).errors == ()
    return copy, before, outcome


def git(folder, *arguments):
    author = ["-c", "user.name=test", "-c", "user.email=test@example.invalid", "-c", "core.autocrlf=false"]
    done = subprocess.run(["git", *author, *arguments], cwd=folder, check=True, capture_output=True)
    return done.stdout.decode()


def all_plans(folder):
    """Every plan literal by (file, class, attribute), read with nothing of ours."""
    found = {}
    for path in sorted([*folder.rglob("configuration_*.py"), *folder.rglob("modular_*.py")]):
        text = path.read_bytes()
        if b"_plan" not in text:
            continue
        for node in ast.walk(ast.parse(text)):
            for statement in node.body if isinstance(node, ast.ClassDef) else ():
                if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict):
                    name = ast.unparse(statement.targets[0])
                    if re.fullmatch(r"base_model_(tp|ep)_plan", name) and all(statement.value.keys):
                        try:
                            found[str(path.relative_to(folder)), node.name, name] = ast.literal_eval(statement.value)
                        except ValueError:
                            continue
    return found


def test_every_packed_expert_plan_becomes_param_level(tree):
    folder, before, _ = tree
    after = all_plans(folder)
    assert before.keys() == after.keys()
    packed = 0
    for place, plan in before.items():
        expected = dict(plan)
        for key, style in plan.items() if place[2] == "base_model_tp_plan" else ():
            match = EXPERTS.fullmatch(key)
            if match and match[1] == "gate_up_proj" and style == "packed_colwise":
                packed += 1
                down = key.replace("gate_up_proj", "down_proj")
                assert plan[down] == "rowwise"
                expected |= {key: "moe_tp_gate_up_colwise", down: "moe_tp_down_rowwise"}
        assert list(after[place].items()) == list(expected.items()), place
    # Since 5.24 five more: families with a configuration only, such as sarvam_moe.
    assert packed == (92 if version("transformers").startswith("5.23.") else 97)


def test_the_patch_touches_plan_lines_only(tree):
    folder, _, outcome = tree
    changed = [line for line in git(folder, "diff").splitlines() if re.match(r"[-+](?![-+])", line)]
    entry = re.compile(r'[-+]\s+"[\w.*]*experts\.(gate_up|down)_proj": "(packed_colwise|rowwise|moe_tp_\w+)",')
    assert [line for line in changed if not entry.fullmatch(line)] == []
    assert len(changed) == 2 * sum(len(change.edits) for change in outcome.changes)


def test_irregular_models_are_untouched_each_with_a_note(tree):
    folder, _, outcome = tree
    notes = {found.path.parent.name: found.finding.code for found in outcome.findings}
    assert notes == {
        "aria": "MIG101",
        "inkling": "MIG104",
        "inkling2": "MIG104",
        "llama4": "MIG101",
        "nemotron_h": "MIG103",
    }
    assert {found.finding.severity for found in outcome.findings} == {"note"}
    touched = {Path(line).parts[0] for line in git(folder, "diff", "--name-only").splitlines()}
    assert touched.isdisjoint({*notes, "gpt_oss"})


def test_a_second_run_changes_nothing(tree):
    folder, _, outcome = tree
    assert outcome.errors == ()
    again = plan_rewrites([folder])
    assert again.changes == ()
    assert [found.finding for found in again.findings] == [found.finding for found in outcome.findings]


def test_owners_and_copies_both_changed(tree):
    _, _, outcome = tree
    roles = {change.path.name: change.role for change in outcome.changes}
    assert roles["configuration_mixtral.py"] == "owner"
    assert roles["modular_laguna.py"] == "owner"
    assert roles["configuration_laguna.py"] == "copy"
    assert roles["configuration_mellum.py"] == "copy", "its modular file only inherits the plan"


def test_families_with_a_configuration_only_are_rewritten_with_their_owners(tree):
    """Since transformers 5.24, sarvam_mla and sarvam_moe among them: other families have their modeling files."""
    folder, _, outcome = tree
    without_modeling = {path.parent.name for path in folder.glob("*/configuration_*.py")} - {
        path.parent.name for path in folder.glob("*/modeling_*.py")
    }
    if not without_modeling & {"sarvam_mla", "sarvam_moe"}:
        pytest.skip("this release has no family with plans that has a configuration only")
    changed = {change.path.parent.name for change in outcome.changes}
    assert {"sarvam_mla", "sarvam_moe"} <= without_modeling
    assert {"deepseek_v3", "axk1", "kimi_linear", "sarvam_mla", "glm4_moe", "glm4v_moe", "sarvam_moe"} <= changed
