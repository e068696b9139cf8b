"""`migrator diff` as a user runs it, on a git repository of real model folders."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.waiting import HANG_TIMEOUT, wait_until

MIGRATOR = str(Path(sys.executable).with_name("migrator"))
MODELS = "src/transformers/models"
MIXTRAL = f"{MODELS}/mixtral/configuration_mixtral.py"
Q_PROJ = '"layers.*.self_attn.q_proj": "colwise"'
OFFSPRING = """
from ..mixtral.configuration_mixtral import MixtralConfig


class OffspringConfig(MixtralConfig):
    model_type = "offspring"
"""


def run(root, *arguments, **environment):
    environment = environment or {name: value for name, value in os.environ.items() if name != "GITHUB_WORKSPACE"}
    return subprocess.run(arguments, cwd=root, capture_output=True, check=False, text=True, env=environment)


def diff(root, *arguments):
    return run(root, MIGRATOR, "diff", *arguments)


def git(root, *arguments):
    done = run(root, "git", "-c", "user.name=test", "-c", "user.email=test@example.invalid", *arguments)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def root(tmp_path, installed_transformers):
    """Two real models and a class that inherits its plans from one of them."""
    for name in ("mixtral", "mellum", "qwen3_moe"):
        source = installed_transformers / "models" / name
        shutil.copytree(source, tmp_path / MODELS / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / MODELS / "offspring").mkdir()
    (tmp_path / MODELS / "offspring/configuration_offspring.py").write_text(OFFSPRING)
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-qm", "base")
    return tmp_path


@pytest.fixture
def moved(root):
    text = (root / MIXTRAL).read_text()
    (root / MIXTRAL).write_text(text.replace(Q_PROJ, Q_PROJ.replace("colwise", "rowwise")))
    return root


def test_a_rewrite_is_clean(root):
    assert run(root, MIGRATOR, "rewrite", "src").returncode == 0
    done = diff(root, "HEAD")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == "8 entries of 4 classes: 8 renamed; 0 unexplained"
    assert "packed_colwise → moe_tp_gate_up_colwise" in done.stdout
    assert "mellum, mixtral, offspring and 1 more" in done.stdout


PP_NORM = '"norm": (["hidden_states"], ["hidden_states"])'
PP_NOTE = "no release of transformers splits stages by it"


def test_pipeline_plans_are_compared_with_a_note_that_nothing_follows(root):
    text = (root / MIXTRAL).read_text()
    assert PP_NORM in text
    (root / MIXTRAL).write_text(text.replace(PP_NORM, PP_NORM.replace('["hidden_states"])', '["normed"])')))
    done = diff(root, "HEAD")
    assert (done.returncode, done.stderr) == (0, "")
    *notes, summary = done.stdout.splitlines()
    line = text.split(PP_NORM)[0].count("\n") + 1
    change = "(['hidden_states'], ['hidden_states']) → (['hidden_states'], ['normed'])"
    assert notes == [
        f"note {MIXTRAL}:{line} {name}.base_model_pp_plan norm: {change}; {PP_NOTE}"
        for name in ("MixtralConfig", "OffspringConfig")
    ]
    assert summary == "no other plan differs between HEAD and the working tree"
    found = json.loads(diff(root, "HEAD", "--format", "json").stdout)
    assert (found["differences"], [row["model"] for row in found["pipeline"]]) == ([], ["mixtral", "offspring"])
    lines = diff(root, "HEAD", "--format", "github").stdout.splitlines()
    assert [text.startswith("::notice ") and text.endswith(PP_NOTE) for text in lines] == [True, True]


def test_a_pipeline_plan_that_is_taken_away_is_compared_too(root):
    with (root / MODELS / "offspring/configuration_offspring.py").open("a") as file:
        file.write("    base_model_pp_plan = None\n")
    done = diff(root, "HEAD")
    assert done.returncode == 0
    notes = [line for line in done.stdout.splitlines() if line.startswith("note ")]
    assert [" OffspringConfig.base_model_pp_plan" in line for line in notes] == [True] * 4
    assert sum("base_model_pp_plan: none → None;" in line for line in notes) == 1
    assert sum("→ none;" in line for line in notes) == 3


def test_an_inherited_change_fails_until_it_is_allowed(moved):
    done = diff(moved, "HEAD")
    assert done.returncode == 1
    line = [line for line in done.stdout.splitlines() if line.startswith("unexplained")]
    assert len(line) == 1
    assert line[0].startswith(f"unexplained {MIXTRAL}:")
    assert line[0].endswith(
        "OffspringConfig.base_model_tp_plan layers.*.self_attn.q_proj in offspring, which inherits it: "
        "colwise → rowwise, Shard(0) → Shard(1)"
    )
    assert done.stdout.splitlines()[-1] == "2 entries of 2 classes: 2 other placement; 1 unexplained"
    assert diff(moved, "HEAD", "--allow", "mixtral").returncode == 1
    done = diff(moved, "HEAD", "--allow", "offspring", "--allow", "mellum")
    assert done.returncode == 0
    assert done.stderr == "--allow mellum: no plan of this model changed\n"


@pytest.mark.parametrize("allowed", [("typo",), ("offspring", "typo")])
def test_a_model_that_no_tree_has_cannot_be_allowed(moved, allowed):
    done = diff(moved, "HEAD", *(word for name in allowed for word in ("--allow", name)))
    assert (done.returncode, done.stdout) == (2, "")
    assert "--allow typo: neither HEAD nor the working tree has a model of this name" in done.stderr


def test_two_revisions_from_a_subfolder(moved):
    git(moved, "commit", "-qam", "moved")
    done = diff(moved / MODELS, "HEAD~1", "HEAD", "--format", "json")
    assert done.returncode == 1
    result = json.loads(done.stdout)
    assert (result["base"], result["head"], result["unexplained"]) == ("HEAD~1", "HEAD", 1)
    mixtral, offspring = result["differences"]
    assert mixtral["path"] == MIXTRAL
    assert (mixtral["change"], mixtral["explained"], offspring["explained"]) == ("placement", True, False)
    assert offspring["after"]["path"] == MIXTRAL
    assert offspring["before"] | {"line": 0} == {
        "style": "colwise",
        "placement": "Shard(0)",
        "meaning": "linear/out",
        "path": MIXTRAL,
        "line": 0,
    }
    done = diff(moved, "HEAD", "HEAD")
    assert (done.returncode, done.stdout) == (0, "no plan differs between HEAD and HEAD\n")


MADE = """
class MadeConfig:
    base_model_tp_plan = make(1)

    def narrow(self):
        if self.narrow:
            self.base_model_tp_plan["norm"] = "rowwise"
"""


def test_unread_plans_and_changed_conditions_are_described(root):
    made = root / MODELS / "made/configuration_made.py"
    made.parent.mkdir()
    made.write_text(MADE)
    git(root, "add", "-A")
    git(root, "commit", "-qm", "made")
    made.write_text(MADE.replace("make(1)", "make(2)").replace("if self.narrow", "if self.wide"))
    done = diff(root, "HEAD")
    assert done.returncode == 1
    assert done.stdout.splitlines()[-2:] == [
        f"unexplained {MODELS}/made/configuration_made.py:3 MadeConfig.base_model_tp_plan in made may have changed: "
        "something it is built from did, and cannot be read; look there",
        "2 entries of 1 class: 1 other condition, 1 may have changed; 1 unexplained",
    ]
    assert diff(root, "HEAD", "--allow", "made").returncode == 0
    unread, condition = json.loads(diff(root, "HEAD", "--format", "json").stdout)["differences"]
    assert (unread["change"], unread["explained"], unread["moved_from"]) == ("unread", False, None)
    assert (condition["change"], condition["explained"]) == ("condition", True)
    assert condition["moved_from"] == "base_model_tp_plan in narrow if self.narrow"
    assert condition["plan"] == "base_model_tp_plan in narrow if self.wide"


def test_github_annotations_point_to_the_entry(moved):
    done = diff(moved, "HEAD", "--format", "github")
    assert done.returncode == 1
    line = next(n for n, text in enumerate((moved / MIXTRAL).read_text().splitlines(), 1) if '"rowwise"' in text)
    own, inherited = done.stdout.splitlines()
    assert own.startswith(f"::notice file={MIXTRAL},line={line},title=plan diff::MixtralConfig.base_model_tp_plan")
    assert inherited.startswith(f"::error file={MIXTRAL},line={line},title=plan diff::OffspringConfig")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "there is no commit, branch or tag 'nowhere'"),
        (["HEAD", "nowhere"], "there is no commit, branch or tag 'nowhere'"),
        ([], "Missing argument"),
    ],
)
def test_bad_usage_is_2(root, arguments, message):
    done = diff(root, *arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert message in done.stderr


def test_outside_of_a_repository(tmp_path):
    done = diff(tmp_path, "HEAD")
    assert done.returncode == 2
    assert "not a git repository" in done.stderr


def test_a_repository_without_models_has_nothing_to_compare(tmp_path):
    git(tmp_path, "init", "-q")
    git(tmp_path, "commit", "-qm", "empty", "--allow-empty")
    done = diff(tmp_path, "HEAD")
    assert done.returncode == 2
    assert "neither HEAD nor the working tree contains a model or a plan" in done.stderr


def test_a_file_that_does_not_parse_is_2_and_named(moved):
    (moved / MODELS / "mellum/configuration_mellum.py").write_text("class (\n_plan = 1\n")
    done = diff(moved, "HEAD")
    assert done.returncode == 2
    assert "mellum/configuration_mellum.py:1: does not parse" in done.stderr
    assert "1 unexplained" in done.stdout, "the others are compared"


def test_a_plan_outside_of_classes_at_the_top_of_the_repository(root):
    (root / "serve.py").write_text('model = load(tp_plan={"norm": "colwise"})\n')
    git(root, "add", "-A")
    git(root, "commit", "-qm", "serve")
    (root / "serve.py").write_text('model = load(tp_plan={"norm": "rowwise"})\n')
    done = diff(root, "HEAD", "--format", "github")
    assert done.returncode == 0
    assert done.stdout.startswith("::notice file=serve.py,line=1,title=plan diff::tp_plan norm: colwise → rowwise")
    assert diff(root, "HEAD", "--allow", "serve").returncode == 0


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM that a process can handle")
def test_a_termination_leaves_no_temporary_folder(root, tmp_path):
    """The process is ended while it compares: a git that is put before the real one waits."""
    folder, bin_folder, reached = tmp_path / "temporary", tmp_path / "bin", tmp_path / "reached"
    folder.mkdir()
    bin_folder.mkdir()
    git_path = shutil.which("git")
    slow = f'#!/bin/sh\nif ls "{folder}"/migrator-* >/dev/null 2>&1; then touch "{reached}"; exec sleep 30; fi\n'
    (bin_folder / "git").write_text(f'{slow}exec "{git_path}" "$@"\n')
    (bin_folder / "git").chmod(0o755)
    edited = root / MIXTRAL
    edited.write_text(edited.read_text().replace(Q_PROJ, Q_PROJ.replace("colwise", "rowwise")))
    environment = os.environ | {"TMPDIR": str(folder), "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}"}
    with subprocess.Popen([MIGRATOR, "diff", "HEAD"], cwd=root, env=environment, stderr=subprocess.PIPE) as process:
        wait_until(reached.exists, process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=HANG_TIMEOUT) == 2
    assert list(folder.iterdir()) == []


def test_without_git(root, tmp_path):
    done = run(root, MIGRATOR, "diff", "HEAD", PATH=str(tmp_path))
    assert done.returncode == 2
    assert "needs git, which is not installed" in done.stderr


def exclude(root, pattern):
    (root / "pyproject.toml").write_text(f'[tool.migrator]\nexclude = ["{pattern}"]\n')


@pytest.mark.parametrize("pattern", [MIXTRAL, "mixtral", "src/**/mixtral"])
def test_an_excluded_file_is_named_but_not_compared(moved, pattern):
    exclude(moved, pattern)
    done = diff(moved, "HEAD", "--format", "json")
    report = json.loads(done.stdout)
    assert {one["model"] for one in report["differences"]} == {"offspring"}, "which inherits the plan"
    assert report["excluded"] == [MIXTRAL]
    assert MIXTRAL in diff(moved, "HEAD").stderr


@pytest.mark.parametrize("pattern", ["offspring", "qwen3_moe", "*.txt"])
def test_only_changed_files_with_plans_are_named_as_excluded(moved, pattern):
    exclude(moved, pattern)
    (moved / "notes.txt").write_text("none")
    report = json.loads(diff(moved, "HEAD", "--format", "json").stdout)
    assert report["excluded"] == []
    assert "mixtral" in {one["model"] for one in report["differences"]}


def test_an_excluded_template_is_no_error(root):
    exclude(root, "templates")
    (root / "templates").mkdir()
    (root / "templates/configuration_x.py").write_text("class {{ name }}:\n    base_model_tp_plan = {}\n")
    assert diff(root, "HEAD").returncode == 0
