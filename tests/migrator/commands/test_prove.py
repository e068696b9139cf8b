"""`migrator prove` on forks of real models: sound ones, planted defects, and classes of which nothing can be said."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from migrator.proofs import prove
from migrator.settings import Prove
from tests.forks import fork_model, fork_transformers
from tests.migrator.source_trees import MIGRATOR
from tests.waiting import HANG_TIMEOUT

FAMILY = "qwen3_moe"
FILE = f"configuration_{FAMILY}.py"
O_PROJ = '"layers.*.self_attn.o_proj": "rowwise"'
EXPERTS = '        "layers.*.mlp.experts": "moe_tp_experts",\n'
ROUTED = '"layers.*.mlp.experts": "ep_dispatch_experts"'
COMPUTED = "attn_output = self.o_proj(attn_output)"

DEFECTS = {
    "swapped_style": ({O_PROJ: O_PROJ.replace("rowwise", "colwise")}, "tp", "refused", '"layers.*.self_attn.q_proj"'),
    "missing_experts": ({EXPERTS: ""}, "tp", "refused", '"layers.*.mlp.experts.gate_up_proj": "packed_colwise"'),
    "doubled_sum": ({EXPERTS: EXPERTS + '        "layers.*.mlp": "all_reduce",\n'}, "tp", "refused", '"layers.*.mlp":'),
    "unmasked_router": ({ROUTED: ROUTED.replace("ep_dispatch", "moe_tp")}, "ep", "refused", '"moe_tp_experts",\n    }'),
    "local_mean": (
        {COMPUTED: COMPUTED.replace("(attn_output)", "(attn_output * attn_output.mean())")},
        "tp",
        "differs",
        "",
    ),
}
"""By name: the edits, the mode that finds the defect, how, and the text of the line that is to be named."""


@dataclass(frozen=True)
class Run:
    folder: Path
    code: int
    report: dict[str, Any]

    def results(self, name: str) -> dict[str, dict[str, Any]]:
        (row,) = [row for row in self.report["classes"] if Path(row["path"]).parent.name == name]
        return {result["mode"]: result for result in row["results"]}


def run_prove(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [MIGRATOR, "prove", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, timeout=HANG_TIMEOUT)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One run over all of these, for most of a run is the start of its processes."""
    folder = tmp_path_factory.mktemp("forks")
    fork_model(folder, FAMILY, name="sound")
    for name, (edits, *_) in DEFECTS.items():
        fork_model(folder, FAMILY, edits, name=name)
    own = "from transformers.configuration_utils"
    fork_model(folder, FAMILY, {own: f"import nothing_of_this_name\n{own}"}, name="broken_import")
    start = "    def __post_init__(self, **kwargs):\n"
    fork_model(folder, FAMILY, {start: f"{start}        raise ValueError('first\\nand last')\n"}, name="broken_class")
    fork_model(folder, FAMILY, {start: f"{start}        bytearray(2**35)\n"}, name="huge")
    (folder / "notes.txt").write_text("no Python")
    done = run_prove(".", "--mode", "tp,ep,sp", "--format", "json", "--save-failures", "failures", cwd=folder)
    assert done.stderr == ""
    return Run(folder, done.returncode, json.loads(done.stdout))


def test_a_sound_tree_passes_and_a_mode_without_a_plan_is_no_failure(run: Run) -> None:
    results = run.results("sound")
    assert {mode: result["outcome"] for mode, result in results.items()} == {
        "tp": "passed",
        "ep": "passed",
        "sp": "no plan",
    }
    for mode in ("tp", "ep"):
        assert results[mode]["sharded"] > 0
        assert 0 < results[mode]["gradients"] < 1e-12


@pytest.mark.parametrize("name", DEFECTS)
def test_a_planted_defect_is_found_in_its_mode_on_its_line(name: str, run: Run) -> None:
    _, mode, outcome, text = DEFECTS[name]
    results = run.results(name)
    assert results[mode]["outcome"] == outcome, results[mode]
    other = "ep" if mode == "tp" else "tp"
    assert results[other]["outcome"] == "passed", results[other]
    lines = (run.folder / name / FILE).read_text("utf-8").splitlines(keepends=True)
    line = results[mode]["line"]
    assert results[mode]["path"].endswith(f"{name}/{FILE}")
    assert text in "".join(lines[line - 1 : line + 1])


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("broken_import", "ModuleNotFoundError: No module named 'nothing_of_this_name'"),
        ("broken_class", "ValueError: first and last"),
        ("huge", "MemoryError"),
    ],
)
def test_a_class_of_which_nothing_can_be_said_is_named_with_its_error(name: str, why: str, run: Run) -> None:
    assert run.code == 2
    for result in run.results(name).values():
        assert result["outcome"] == "not instantiated"
        assert why in result["why"]


def test_counts_are_apart(run: Run) -> None:
    counts = run.report["counts"]["tp"]
    assert {name: count for name, count in counts.items() if count} == {
        "passed": 2,
        "refused": 3,
        "differs": 1,
        "not instantiated": 3,
    }


def test_a_failure_is_repeated_from_its_file_and_nothing_else(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    given = []
    monkeypatch.setattr(
        "runtime.proving.children.prove_tasks", lambda tasks, settings, report: str(given.append((tasks, settings)))
    )
    prove(Prove(replay=run.folder / "failures" / "local_mean-Qwen3MoeConfig-tp.json"))
    (((task,), settings),) = given
    assert (task.module, task.class_name, task.modes) == (
        f"local_mean.configuration_{FAMILY}",
        "Qwen3MoeConfig",
        ("tp",),
    )
    assert (task.tp, task.ep, task.fsdp, task.seed) == (2, 2, 1, 0)
    assert settings.root == run.folder
    assert settings.sizes.largest["hidden_size"] == 32


@pytest.mark.full
def test_a_repeated_failure_is_the_same_in_every_bit(run: Run) -> None:
    report = prove(Prove(replay=run.folder / "failures" / "local_mean-Qwen3MoeConfig-tp.json"))
    (result,) = [result for _, result in report.results]
    known = run.results("local_mean")["tp"]
    assert (result.mode, result.outcome, result.logits) == ("tp", "differs", known["logits"])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--replicate", 0), "Invalid value for '--replicate': 0 is not in the range x>=1."),
        (("--replicate", "two"), "Invalid value for '--replicate': 'two' is not a valid integer"),
        (
            ("--tp", 2, "--ep", 8, "--fsdp", 2, "--replicate", 4),
            "error: ep=8 must be a multiple of tp=2 and divide fsdp*tp=4\n"
            "hint: choose --ep as 2 or 4, or increase --tp "
            "or --fsdp\n",
        ),
        (("--pp", 2), "No such option '--pp'"),
    ],
)
def test_a_mesh_that_no_model_can_have_is_refused_at_once(
    options: tuple[object, ...], expected: str, tmp_path: Path
) -> None:
    done = run_prove("no/such/folder", *options, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert expected in done.stderr


@pytest.mark.full
def test_replicas_of_a_tree_and_a_mesh_that_its_model_cannot_have(tmp_path: Path) -> None:
    fork_model(tmp_path, FAMILY)
    mesh = ("--fsdp", 2, "--replicate", 2, "--mode", "tp,tp_ep")
    done = run_prove(".", *mesh, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert "tp=2 fsdp=2 replicate=2: 1 passed\ntp_ep tp=2 ep=2 fsdp=2 replicate=2: 1 passed\n" in done.stdout
    config = {"model_type": FAMILY, **dict.fromkeys(("num_attention_heads", "num_key_value_heads"), 3)}
    sizes = {"hidden_size": 24, "head_dim": 8, "num_hidden_layers": 1, "num_experts": 2, "vocab_size": 96}
    (tmp_path / "config.json").write_text(json.dumps({**config, **sizes, "num_experts_per_tok": 1}))
    done = run_prove(".", *mesh, "--config", "config.json", "--format", "json", cwd=tmp_path)
    assert done.returncode == 2
    (row,) = json.loads(done.stdout)["classes"]
    assert row["mesh"] == {"tp": 2, "ep": 2, "fsdp": 2, "replicate": 2}
    for result in row["results"]:
        assert (result["outcome"], result["hint"]) == ("does not fit", "sizes that work: 1, 3"), result


def test_only_what_failed_is_saved(run: Run) -> None:
    saved = {Path(path).name for path in run.report["saved"]}
    assert saved == {path.name for path in (run.folder / "failures").iterdir()}
    assert not any(name.startswith("sound") for name in saved)
    assert "unmasked_router-Qwen3MoeConfig-ep.json" in saved


@pytest.mark.full
def test_a_tree_of_transformers_runs_its_own_code_not_the_installed(tmp_path: Path) -> None:
    file = fork_transformers(tmp_path) / FAMILY / FILE
    file.write_text(file.read_text("utf-8").replace(EXPERTS, ""), "utf-8")
    done = run_prove(file.parent, "--mode", "tp", "--format", "github", cwd=tmp_path)
    assert done.returncode == 1
    line = (
        file.read_text("utf-8").splitlines().index('        "layers.*.mlp.experts.gate_up_proj": "packed_colwise",') + 1
    )
    where = file.relative_to(tmp_path)
    assert done.stdout.startswith(
        f"::error file={where},line={line},title=tp refused::Qwen3MoeConfig: model.layers.0.mlp"
    )
    assert done.stderr == ""
