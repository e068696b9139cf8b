"""What a proof takes: which classes, modes, meshes and configs; what it refuses; and how results are printed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from migrator.formats.proof import (
    ProofReport,
    build_proof_table,
    proof_as_json,
    proof_github_lines,
    proof_page_lines,
    proof_summary_lines,
)
from migrator.proofs import compute_proof_exit_code, prove
from migrator.settings import Prove
from plans.errors import UsageError
from runtime.proving.children import ChildSettings
from runtime.proving.sizes import read_sizes
from runtime.proving.task import ModeResult, ProofTask
from tests.forks import fork_model
from tests.migrator.source_trees import commit_all, git

FILE = "configuration_qwen3_moe.py"
Given = list[tuple[ProofTask, ChildSettings]]


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> Given:
    """Take the place of child processes, and pass everything."""
    return answer(monkeypatch, lambda task, mode: ModeResult(mode, "passed", logits=0.0, gradients=0.0, sharded=1))


def answer(monkeypatch: pytest.MonkeyPatch, result: Callable[..., ModeResult]) -> Given:
    taken: Given = []

    def prove_tasks(tasks, settings, report) -> str:
        for task in tasks:
            taken.append((task, settings))
            for mode in task.modes:
                report(task, result(task, mode))
        return "5.24.0"

    monkeypatch.setattr("runtime.proving.children.prove_tasks", prove_tasks)
    return taken


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    fork_model(tmp_path, "qwen3_moe", name="parent")
    fork_model(tmp_path, "mixtral", name="other")
    heir = tmp_path / "heir" / "configuration_heir.py"
    heir.parent.mkdir()
    (heir.parent / "__init__.py").touch()
    heir.write_text(
        "from parent.configuration_qwen3_moe import Qwen3MoeConfig\n"
        "class HeirConfig(Qwen3MoeConfig):\n    model_type = 'heir'\n"
    )
    git(tmp_path, "init", "-q")
    commit_all(tmp_path)
    return tmp_path


def names(given: Given) -> list[str]:
    return [task.class_name for task, _ in given]


def test_every_class_with_a_plan_is_taken_with_the_folder_to_import_it_from(tree: Path, given: Given) -> None:
    report = prove(Prove((tree,)))
    assert names(given) == ["HeirConfig", "MixtralConfig", "Qwen3MoeConfig"]
    assert [task.module for task, _ in given] == [
        "heir.configuration_heir",
        "other.configuration_mixtral",
        "parent.configuration_qwen3_moe",
    ]
    assert {settings.root for _, settings in given} == {tree}
    assert compute_proof_exit_code(report) == 0
    assert report.versions == ("5.24.0",)


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("other/modeling_mixtral.py", ["MixtralConfig"]),
        (f"parent/{FILE}", ["HeirConfig", "Qwen3MoeConfig"]),  # the heir's plan is written there
        ("heir/configuration_heir.py", ["HeirConfig"]),
        ("README.md", []),
    ],
)
def test_only_what_changed_is_taken(
    file: str, expected: list[str], tree: Path, given: Given, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (tree / file).open("a") as stream:
        stream.write("\n# changed\n")
    monkeypatch.chdir(tree)
    report = prove(Prove((tree,)), changed_only=True, base_ref="HEAD")
    assert names(given) == expected
    assert compute_proof_exit_code(report) == 0


def test_modes_are_those_that_the_mesh_has_ranks_for(tree: Path, given: Given) -> None:
    prove(Prove((tree / "other",)))
    prove(Prove((tree / "other",), tp=4, ep=1))
    prove(Prove((tree / "other",), tp=2, ep=4, fsdp=2, mode=("sp_ep",)))
    prove(Prove((tree / "other",), tp=1, replicate=2))
    assert [(task.modes, task.tp, task.ep, task.fsdp, task.replicate) for task, _ in given] == [
        (("tp", "ep", "tp_ep", "sp", "sp_ep"), 2, 2, 1, 1),
        (("tp", "sp"), 4, 1, 1, 1),
        (("sp_ep",), 2, 4, 2, 1),
        (("tp", "sp"), 1, 1, 1, 2),
    ]


def test_replicas_are_told_in_every_form(tree: Path, given: Given, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tree)
    report = prove(Prove((tree / "other",), ep=4, fsdp=2, replicate=3))
    assert proof_as_json(report)["classes"][0]["mesh"] == {"tp": 2, "ep": 4, "fsdp": 2, "replicate": 3}
    shown = ["tp=2 fsdp=2 replicate=3", "ep=4 replicate=3", "tp_ep tp=2 ep=4 fsdp=2 replicate=3"]
    assert build_proof_table(report)[1][:4] == ["config class", *shown]
    assert [line.split(":")[0] for line in proof_summary_lines(report)][:3] == shown
    assert f"| {shown[0]} | 1 | 0 | 0 | 0 | 0 | 0 | 0 |" in list(proof_page_lines(report))


@pytest.mark.parametrize(
    ("settings", "message", "hint"),
    [
        ({"tp": 2, "ep": 3}, "ep=3 must be a multiple of tp=2", "choose `ep=2`"),
        (
            {"tp": 2, "ep": 8, "fsdp": 2, "replicate": 2},
            "ep=8 must be a multiple of tp=2 and divide fsdp*tp=4",
            "choose `ep` as 2 or 4",
        ),
        ({"replicate": 0}, "`replicate` must be at least 1, got 0", "choose a size of 1 or more"),
        ({"ep": 1, "mode": ("ep",)}, "mode 'ep' needs ranks for experts", "set `ep=2` or more"),
        ({"installed": True}, "`installed` takes all of the installed transformers", "leave one of them out"),
        ({"config": Path("absent.json")}, "absent.json: No such file", "name a config in JSON"),
        ({"sizes": Path("absent.toml")}, "absent.toml: cannot be read: No such file", "name a file of sizes in TOML"),
        ({"replay": Path("absent.json")}, "absent.json: No such file", "name a file that `save_failures` wrote"),
    ],
)
def test_bad_requests_are_refused_before_anything_starts(
    settings: dict, message: str, hint: str, tree: Path, given: Given
) -> None:
    with pytest.raises(UsageError) as caught:
        prove(Prove((tree,), **settings))
    assert message in caught.value.message
    assert hint in caught.value.hint
    assert given == []


def test_a_config_of_ones_own_takes_the_class_of_its_model_type(tree: Path, given: Given) -> None:
    file = tree / "config.json"
    file.write_text(json.dumps({"model_type": "heir", "num_hidden_layers": 1}))
    prove(Prove((tree,), config=file))
    ((task, _),) = given
    assert (task.class_name, task.config) == ("HeirConfig", {"model_type": "heir", "num_hidden_layers": 1})
    file.write_text("{}")
    with pytest.raises(UsageError, match="no config class with plans has the model type None") as caught:
        prove(Prove((tree,), config=file))
    assert caught.value.hint == "set its `model_type`, and name the folder of that model, or `installed`"


def test_sizes_of_ones_own_extend_those_that_come_along(tree: Path, given: Given) -> None:
    file = tree / "sizes.toml"
    file.write_text(
        "[largest]\nhidden_size = 64\nmy_width = 8\n[divided]\ntp = ['my_width']\n"
        "[variants.MixtralConfig.'one layer']\nnum_hidden_layers = 1\n[inputs]\nMixtralConfig = 'tokens'\n"
    )
    prove(Prove((tree / "other",), sizes=file))
    assert [task.name for task, _ in given] == ["MixtralConfig", "MixtralConfig, one layer"]
    sizes = given[0][1].sizes
    assert (sizes.largest["hidden_size"], sizes.largest["my_width"], sizes.largest["vocab_size"]) == (64, 8, 101)
    assert {"my_width", "moe_intermediate_size"} <= set(sizes.divided["tp"])


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("[large]\na = 1", "large is not a table of sizes", "largest"),
        ("[largest]\na = 'b'", "largest.a is not a size", "write a number of 1 or more"),
        ("[largest]\na = true", "largest.a is not a size", "write a number of 1 or more"),
        ("classes = 1", "classes is not a table", "write [classes]"),
        ("[classes]\nA = 1", "classes.A is not a table", "write [classes.A]"),
        ("[variants.A]\nb = 1", "variants.A.b is not a table", "write [variants.A.b]"),
        ("[inputs]\nA = 'sounds'", "inputs.A is 'sounds'", "write one of tokens, embeddings"),
        ("[divided]\ncolumns = []", "divided.columns is not a list of fields", "lists are heads, tp, ep, rows"),
        ("a = ", "is not valid TOML", "correct the syntax of the file"),
    ],
)
def test_sizes_of_another_form_are_refused(text: str, message: str, hint: str, tmp_path: Path) -> None:
    (tmp_path / "sizes.toml").write_text(text)
    with pytest.raises(UsageError) as caught:
        read_sizes(tmp_path / "sizes.toml")
    assert message in caught.value.message
    assert hint in caught.value.hint


@pytest.mark.parametrize("content", ["{}", "[]", "{", '{"task": {}, "sizes": {}, "path": "a", "root": null}'])
def test_a_file_that_is_no_failure_is_refused(content: str, tmp_path: Path) -> None:
    file = tmp_path / "failure.json"
    file.write_text(content)
    with pytest.raises(UsageError) as caught:
        prove(Prove(replay=file))
    assert caught.value.message.startswith(str(file))


def build_report(tree: Path, monkeypatch: pytest.MonkeyPatch) -> ProofReport:
    results = {
        "tp": ModeResult("tp", "refused", "it is, refused\nso", "mend it", key="model.layers.*.self_attn.o_proj"),
        "ep": ModeResult("ep", "failed", "it hung"),
        "sp": ModeResult("sp", "no plan", "the class has no sp plan"),
    }
    answer(monkeypatch, lambda task, mode: results[mode])
    return prove(Prove((tree / "heir",), mode=("tp", "ep", "sp")))


def find_line(file: Path, text: str) -> int:
    return next(number for number, line in enumerate(file.read_text().splitlines(), 1) if text in line)


def test_annotations_stand_on_the_line_of_the_entry_or_of_the_plan(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = build_report(tree, monkeypatch)
    monkeypatch.setenv("GITHUB_WORKSPACE", str(tree))
    entry = find_line(tree / "parent" / FILE, '"layers.*.self_attn.o_proj"')
    plan = find_line(tree / "parent" / FILE, '"layers.*.mlp.experts.gate_up_proj": "grouped_gemm"')
    assert list(proof_github_lines(report)) == [
        f"::error file=parent/{FILE},line={entry},title=tp refused::HeirConfig: it is, refused%0Aso%0Amend it",
        f"::error file=parent/{FILE},line={plan},title=ep failed::HeirConfig: it hung",
    ]


def test_where_a_plan_is_wrong_and_of_another_nothing_can_be_said_the_code_is_2(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = build_report(tree, monkeypatch)
    assert compute_proof_exit_code(report) == 2
    answer(monkeypatch, lambda task, mode: ModeResult(mode, "differs", "it does"))
    assert compute_proof_exit_code(prove(Prove((tree / "heir",)))) == 1


def test_text_counts_outcomes_by_mode_and_names_what_did_not_pass(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = build_report(tree, monkeypatch)
    monkeypatch.chdir(tree)
    lines = list(proof_summary_lines(report))
    assert lines[0].startswith(f"refused parent/{FILE}:")
    assert lines[0].endswith("HeirConfig tp: it is, refused\nso; mend it")
    assert lines[-3:-1] == ["tp=2: 1 refused", "ep=2: 1 failed"]  # no class has a plan for the third mode
    page = list(proof_page_lines(report))
    assert "| tp=2 | 0 | 1 | 0 | 0 | 0 | 0 | 0 |" in page
    assert "| HeirConfig | ep | failed | it hung |" in page
