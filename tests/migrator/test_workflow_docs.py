"""What docs/ shows is true: configurations are read, hooks exist, plans decompose, commands and completion work."""

from __future__ import annotations

import ast
import os
import re
import shlex
from pathlib import Path

import pytest
import yaml

from codemods.files.config import read_configuration
from migrator.cli import group
from plans.decompose import apply_edits, decompose
from plans.model_facts import ExpertLayout
from tests.migrator.source_trees import migrator

ROOT = Path(__file__).parents[2]
DOCS = {path.name: path.read_text("utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
WORKFLOW = DOCS["workflow.md"]


def block(name: str) -> str:
    found = re.search(rf"<!-- checked: {name} -->\n```\w+\n(.*?)```", WORKFLOW, re.DOTALL)
    assert found is not None, name
    return found[1]


def test_the_configuration_is_one(tmp_path):
    path = tmp_path / "pyproject.toml"
    path.write_text(block("configuration"))
    found = read_configuration(path)
    assert found.paths == (tmp_path / "src/transformers/models",)
    assert found.exclude == ("**/deprecated",)
    assert not found.is_included(tmp_path / "src/deprecated/x.py")
    assert found.is_ignored(tmp_path / "src/transformers/models/llama4/configuration_llama4.py", "MIG002")


def test_the_hooks_exist():
    shown = [hook["id"] for repository in yaml.safe_load(block("hooks"))["repos"] for hook in repository["hooks"]]
    assert shown == [hook["id"] for hook in yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())]


def test_the_workflows_commands_have_those_options():
    jobs = yaml.safe_load(block("actions"))["jobs"]
    steps = [step for job in jobs.values() for step in job["steps"]]
    commands = [step["run"] for step in steps if step.get("run", "").startswith("migrator")]
    named = []
    for command in commands:
        plain = re.sub(r"\$\{\{.*?\}\}", "main", command).split(" > ")[0]
        _, name, *arguments = shlex.split(plain)
        named.append(name)
        parameters = group.get_command(None, name).make_context(name, arguments).params
        assert parameters.get("paths") or parameters["base"] == "origin/main"
    assert named == ["check", "diff", "prove", "check"]


def test_the_workflow_runs_a_pull_requests_code_without_secrets_and_may_only_read():
    workflow = yaml.safe_load(block("actions"))
    assert workflow[True] == ["pull_request"]  # YAML reads `on` as a truth value
    assert workflow["permissions"] == {"contents": "read"}
    running = [job for job in workflow["jobs"].values() if any("prove" in step.get("run", "") for step in job["steps"])]
    assert len(running) == 1
    assert "permissions" not in running[0]
    assert [
        step["with"]["persist-credentials"] for step in running[0]["steps"] if "checkout" in step.get("uses", "")
    ] == [False]
    assert "secrets." not in block("actions")


@pytest.mark.parametrize("line", [line for line in block("completion").splitlines() if line])
def test_completion_can_be_switched_on(tmp_path, line):
    name, value = re.search(r"(\w+_COMPLETE)=(\w+)", line).groups()
    done = migrator(cwd=tmp_path, env={**os.environ, name: value})
    assert done.returncode == 0
    assert b"_MIGRATOR_COMPLETE" in done.stdout


def test_the_plans_shown_are_before_and_after():
    plans = [
        ast.literal_eval(text.split("=", 1)[1].strip())
        for text in re.findall(r"```python\n(base_model_tp_plan = .*?)```", DOCS["param-level.md"], re.DOTALL)
    ]
    after, before = plans
    assert apply_edits(before, decompose(before, lambda _: ExpertLayout("m.py:E")).edits) == after


def test_every_command_named_exists():
    for name, text in DOCS.items():
        for command in re.findall(r"`migrator (\w+)", text):
            assert command in group.list_commands(None), (name, command)


def test_the_map_of_the_code_has_every_package_in_the_order_that_is_enforced():
    text = DOCS["code.md"]
    contracts = re.findall(r"^layers = \[(.*?)\]$", (ROOT / "pyproject.toml").read_text(), re.DOTALL | re.MULTILINE)
    for name in ("migrator", "codemods", "runtime"):
        listed = re.findall(r"^\| `(\w+)/` \|", text.partition(f"\n## {name}\n")[2].partition("\n## ")[0], re.MULTILINE)
        there = {path.parent.name for path in (ROOT / name).glob("*/__init__.py")}
        assert sorted(listed) == sorted(there)
        layers = next((found for found in contracts if f'"{name}.' in found), "")
        enforced = [layer for layer in re.findall(rf"{name}\.(\w+)", layers) if layer in there]
        assert [one for one in listed if one in enforced] == enforced
