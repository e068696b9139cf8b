"""A dialect file of the user's own, on the command line, in pyproject.toml and in a job file."""

from __future__ import annotations

import json

import pytest

from tests.codemods.helpers import REGULAR, write_tree
from tests.migrator.source_trees import migrator
from tests.plans.test_dialect_file import FORK

PLAN = 'class ToyConfig:\n    base_model_tp_plan = {"layers.*.mlp.gate": "our_colwise"}\n'
ROUTED = REGULAR + (
    "\n\nclass ToyMLP(nn.Module):\n    def __init__(self, config):\n        self.gate = nn.Linear(1, 1)\n\n\n"
    "class ToyModel(nn.Module):\n    def __init__(self, config: ToyConfig):\n"
    "        self.layers = nn.ModuleList([ToyLayer(config)])\n\n\n"
    "class ToyLayer(nn.Module):\n    def __init__(self, config):\n        self.mlp = ToyMLP(config)\n"
)


@pytest.fixture
def tree(tmp_path):
    files = {"toy/configuration_toy.py": PLAN, "toy/modeling_toy.py": ROUTED, "dialects/fork.toml": FORK}
    return write_tree(tmp_path, files)


def read(tree):
    return (tree / "toy/configuration_toy.py").read_text()


def test_its_styles_are_unknown_without_it_and_known_with_it(tree):
    assert b"MIG501" in migrator("check", "toy", cwd=tree).stdout
    done = migrator("check", "toy", "--source", "./dialects/fork.toml", "--format", "json", cwd=tree)
    assert done.returncode == 0
    assert json.loads(done.stdout)["dialect"]["dialect"] == "our-fork"


def test_plans_are_translated_from_it_and_to_it(tree):
    there = ["--source", "dialects/fork.toml", "--target", "transformers-5.23"]
    assert migrator("rewrite", "toy", *there, cwd=tree).returncode == 0
    assert read(tree) == PLAN.replace("our_colwise", "colwise")
    write_tree(tree, {"dialects/fork.toml": FORK.replace("removed = [", 'removed = ["colwise", ')})
    back = ["--source", "transformers-5.23", "--target", "dialects/fork.toml"]
    assert migrator("rewrite", "toy", *back, cwd=tree).returncode == 0
    assert read(tree) == PLAN


def test_configuration_names_it_relative_to_itself(tree):
    write_tree(tree, {"pyproject.toml": '[tool.migrator]\nsource = "dialects/fork.toml"\n'})
    assert migrator("check", ".", cwd=tree / "toy").returncode == 0
    assert migrator("rewrite", "--check", ".", cwd=tree / "toy").returncode == 0


def test_a_job_names_it_relative_to_itself_and_runs_again_when_it_changes(tree):
    job = 'output = "out"\n[check]\npaths = ["toy"]\nsource = "./dialects/fork.toml"\n'
    write_tree(tree, {"job.toml": job, "elsewhere/x.py": ""})
    assert migrator("run", "../job.toml", cwd=tree / "elsewhere").returncode == 0
    write_tree(tree, {"dialects/fork.toml": FORK.replace("our_colwise", "their_colwise")})
    assert migrator("run", "../job.toml", cwd=tree / "elsewhere").returncode == 1


@pytest.mark.parametrize("command", ["check", "rewrite"])
@pytest.mark.parametrize("option", ["--source", "--target"])
@pytest.mark.parametrize(
    ("name", "message"),
    [("./absent.toml", "cannot be read"), ("dialects/bad.toml", "styles.x.job is 'bth'"), ("klingon", "no dialect")],
)
def test_a_file_that_is_no_dialect_is_refused(tree, command, option, name, message):
    write_tree(tree, {"dialects/bad.toml": FORK.replace('"both"', '"bth"').replace("our_colwise", "x")})
    done = migrator(command, "toy", option, name, cwd=tree)
    assert done.returncode == 2
    assert message in done.stderr.decode()
    assert read(tree) == PLAN
