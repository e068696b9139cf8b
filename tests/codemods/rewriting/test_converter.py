"""The tree's own converter as proof, on a repository made in the test and converted by a real subprocess."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from codemods.rewriting.converter import convert
from codemods.rewriting.migrate import plan_rewrites
from codemods.rewriting.proof import verify_outcome
from codemods.rewriting.write import write_changes
from plans.errors import MismatchError, SourceError, UsageError, WorkerError
from tests.codemods.helpers import REGULAR, write_tree

CONVERTER = Path(__file__).with_name("tree_converter") / "modular_model_converter.py"
MODELS = "src/transformers/models"

ALPHA = """
from ...configuration_utils import PreTrainedConfig


class AlphaConfig(PreTrainedConfig):
    model_type = "alpha"
    base_model_tp_plan = {
        "layers.*.mlp.experts.gate_up_proj": "packed_colwise",  # gate and up
        "layers.*.mlp.experts.down_proj": "rowwise",
        "layers.*.mlp.experts": "moe_tp_experts",
    }
    base_model_ep_plan = {"layers.*.mlp.experts.gate_up_proj": "grouped_gemm"}
"""
CHILD = """
from ..{parent}.configuration_{parent} import {Parent}Config


class {Child}Config({Parent}Config):
    model_type = "{child}"
"""


def child(name, parent, *lines):
    text = CHILD.format(parent=parent, Parent=parent.title(), child=name, Child=name.title())
    return text + "".join(f"    {line}\n" for line in lines)


MODULARS = {
    "alpha": ALPHA,
    "beta": child("beta", "alpha"),
    "aardvark": child("aardvark", "beta", "base_model_ep_plan = None"),  # sorts before its parents
    "gamma": child("gamma", "aardvark", "base_model_tp_plan = AttributeError()"),
    "delta": child("delta", "beta", 'base_model_tp_plan = {"layers.*.self_attn.q_proj": "colwise"}'),
}
ORDER = ("alpha", "beta", "aardvark", "gamma", "delta")


@pytest.fixture
def repository(tmp_path):
    """A repository with a chain of three levels, whose generated files the converter itself wrote."""
    files = {f"{MODELS}/{name}/modular_{name}.py": text for name, text in MODULARS.items()}
    files |= {f"{MODELS}/{name}/modeling_{name}.py": REGULAR for name in MODULARS}
    root = write_tree(tmp_path / "repository", files)
    (root / "utils").mkdir()
    shutil.copy(CONVERTER, root / "utils")
    for name in ORDER:
        run_converter(root, f"{MODELS}/{name}/modular_{name}.py")
    return root


def run_converter(root, *names):
    subprocess.run([sys.executable, "utils/modular_model_converter.py", *names], cwd=root, check=True)


def contents(root):
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


def verify(root, **keywords):
    outcome = plan_rewrites([root])
    assert outcome.errors == ()
    return verify_outcome(outcome, [root], **keywords)


def configuration(root, name):
    return root / MODELS / name / f"configuration_{name}.py"


def test_the_small_converter_inherits_as_transformers_own_does(repository):
    text = {name: configuration(repository, name).read_text() for name in MODULARS}
    plan = re.compile(r"base_model_tp_plan = \{.*?\}", re.DOTALL)
    assert plan.search(text["aardvark"])[0] == plan.search(text["alpha"])[0], "comments and all"
    assert "base_model_ep_plan = None" in text["aardvark"]
    assert "base_model_tp_plan" not in text["gamma"]
    assert "base_model_ep_plan = None" in text["gamma"], "inherited through two levels"
    assert plan.search(text["delta"])[0] == 'base_model_tp_plan = {"layers.*.self_attn.q_proj": "colwise"}'
    assert "class DeltaConfig(PreTrainedConfig):" in text["delta"]


def test_a_rewrite_of_a_chain_is_what_the_converter_writes(repository, monkeypatch):
    before = contents(repository)
    converted = []

    def watched(root, copy, modulars, timeout):
        converted.append([path.name for path in modulars])
        return convert(root, copy, modulars, timeout)

    monkeypatch.setattr("codemods.rewriting.proof.convert", watched)
    outcome = plan_rewrites([repository])
    assert {change.path.name for change in outcome.changes} == {
        "modular_alpha.py",
        "configuration_alpha.py",
        "configuration_beta.py",
        "configuration_aardvark.py",
    }
    assert verify_outcome(outcome, [repository]) == []
    assert contents(repository) == before, "the tree itself is not touched"
    assert converted == [
        ["modular_alpha.py"],
        ["modular_beta.py"],
        ["modular_aardvark.py", "modular_delta.py"],
        ["modular_gamma.py"],
    ], "parents first; gamma and delta read a changed file too"


def test_what_is_written_then_is_what_the_converter_writes(repository):
    outcome = plan_rewrites([repository])
    assert write_changes(outcome.changes).errors == ()
    written = contents(repository)
    for name in ORDER:
        run_converter(repository, f"{MODELS}/{name}/modular_{name}.py")
    assert contents(repository) == written


def test_nothing_to_rewrite_is_nothing_to_prove(repository):
    write_changes(plan_rewrites([repository]).changes)
    (repository / "utils/modular_model_converter.py").write_text("raise RuntimeError('never run')\n")
    assert verify(repository) == []


def test_a_copy_that_someone_edited_fails(repository):
    path = configuration(repository, "beta")
    path.write_text(path.read_text().replace('"beta"', '"Beta"'))
    errors = verify(repository)
    assert {Path(error.data["path"]).name for error in errors} == {"configuration_beta.py"}
    assert isinstance(errors[0], MismatchError)
    assert re.search(r"configuration_beta\.py: line \d+ differs from what the converter writes$", errors[0].message)


def test_a_copy_that_the_rewrite_missed_fails(repository):
    """A modular file that reads a changed file is converted although nothing of its own would change."""
    path = configuration(repository, "delta")
    path.write_text(path.read_text().replace("q_proj", "k_proj"))
    errors = verify(repository)
    assert [Path(error.data["path"]).name for error in errors] == ["configuration_delta.py"]
    assert errors[0].message.endswith(
        "differs from what the converter writes, and the rewrite leaves this file as it is"
    )


def test_a_file_that_the_tree_does_not_have_fails(repository):
    converter = repository / "utils/modular_model_converter.py"
    extra = "    Path(names[0]).with_name('extra.py').write_text('x = 1\\n')\n"
    converter.write_text(converter.read_text().replace("def main(names):\n", f"def main(names):\n{extra}"))
    errors = verify(repository)
    assert "extra.py: the converter writes this file" in errors[0].message


@pytest.mark.parametrize(
    ("failure", "complaint"),
    [
        ("raise ValueError('no such class')", "ValueError: no such class"),
        (
            "import traceback\ntry: 1 / 0\nexcept ZeroDivisionError: traceback.print_exc(); sys.exit(0)",
            "ZeroDivisionError: division by zero",
        ),
        ("print('RuntimeError: lost'); sys.exit(0)", "RuntimeError: lost"),
        ("print('gave up'); sys.exit(3)", "gave up"),
        ("sys.exit(3)", "exit code 3"),
    ],
)
def test_a_converter_that_fails_is_an_error_naming_the_file(repository, failure, complaint, capfd):
    converter = repository / "utils/modular_model_converter.py"
    guard = f"if 'modular_beta.py' in str(sys.argv):\n{textwrap.indent(failure, '    ')}\n"
    converter.write_text(converter.read_text().replace("if __name__", f"{guard}if __name__"))
    errors = verify(repository)
    assert [type(error) for error in errors] == [SourceError]
    assert errors[0].message == f"{MODELS}/beta/modular_beta.py: the modular converter fails: {complaint}"
    assert capfd.readouterr() == ("", ""), "what the converter prints stays with us"


def test_of_several_files_in_one_run_the_failing_one_is_named(repository):
    converter = repository / "utils/modular_model_converter.py"
    first = "        path = Path(name)\n"
    refusal = "        assert 'gamma' not in name\n"
    converter.write_text(converter.read_text().replace(first, refusal + first))
    assert [error.data["paths"] for error in verify(repository)] == [[f"{MODELS}/gamma/modular_gamma.py"]]


def test_a_converter_that_does_not_end_is_stopped(repository, monkeypatch):
    converter = repository / "utils/modular_model_converter.py"
    converter.write_text("import signal\nsignal.pause()\n")
    started = []

    class Watched(subprocess.Popen):
        def __init__(self, *arguments, **keywords):
            super().__init__(*arguments, **keywords)
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Watched)
    with pytest.raises(WorkerError, match=r"modular_alpha\.py: the modular converter did not finish within 0\.5 s"):
        verify(repository, timeout=0.5)
    assert [process.returncode for process in started] == [-signal.SIGKILL]


def test_a_circle_of_modular_files_is_an_error_not_a_hang(repository):
    alpha = repository / MODELS / "alpha/modular_alpha.py"
    alpha.write_text("from ..aardvark.configuration_aardvark import AardvarkConfig\n" + alpha.read_text())
    with pytest.raises(SourceError, match="import from each other in a circle: modular_"):
        verify(repository)


def test_a_tree_without_a_converter_is_bad_usage(repository):
    (repository / "utils/modular_model_converter.py").unlink()
    with pytest.raises(UsageError, match=r"no folder above it holds utils/modular_model_converter\.py"):
        verify(repository)
    write_changes(plan_rewrites([repository]).changes)
    with pytest.raises(UsageError):
        verify(repository)


def test_links_that_lead_out_are_not_written_through(repository, tmp_path):
    """A generated file that is a link to elsewhere is a file of its own in the copy."""
    outside = tmp_path / "configuration_beta.py"
    configuration(repository, "beta").rename(outside)
    configuration(repository, "beta").symlink_to(outside)
    (repository / "src/loop").symlink_to(repository)
    before = contents(repository) | {outside: outside.read_bytes()}
    verify(repository)
    assert contents(repository) | {outside: outside.read_bytes()} == before


def test_the_command_writes_only_what_the_converter_confirms(repository):
    migrator = str(Path(sys.executable).with_name("migrator"))
    command = [migrator, "rewrite", "src", "--verify"]
    copy = configuration(repository, "beta")
    text = copy.read_text()
    copy.write_text(text.replace('"beta"', '"Beta"'))
    before = contents(repository)
    done = subprocess.run(command, cwd=repository, capture_output=True, check=False)
    assert done.returncode == 1, done.stderr.decode()
    assert contents(repository) == before
    assert "configuration_beta.py" in done.stderr.decode()
    copy.write_text(text)
    done = subprocess.run(command, cwd=repository, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    assert "moe_tp_gate_up_colwise" in copy.read_text()
    (repository / "utils/modular_model_converter.py").unlink()
    done = subprocess.run(command, cwd=repository, capture_output=True, check=False)
    assert done.returncode == 2
    assert done.stderr.decode().startswith("error:")
