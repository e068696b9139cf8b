"""A sample of `make sweep`: plans of the installed transformers proven, refused and found wrong, in this process."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from codemods.rewriting.migrate import plan_rewrites
from codemods.tree.plan_classes import PlanClass, find_plan_classes
from plans.mesh import Mesh, Mode
from runtime.parallel.parallelize import parallelize
from runtime.proving import compare
from runtime.proving.prove import ClassProof
from runtime.proving.sizes import load_sizes
from runtime.proving.task import ModeResult, ProofTask
from tests.runtime.validation.validation_cases import DEFECTS
from tests.sequence_plans import SEQUENCE_PLANS, fork_with_sequence_plan

MODELS = Path(transformers.__file__).parent / "models"


@pytest.fixture(scope="module")
def classes() -> dict[str, PlanClass]:
    return {one.name: one for one in find_plan_classes([MODELS])}


def prove(one: PlanClass, mode: Mode, variant: str = "", **sizes: int) -> ModeResult:
    task = ProofTask(one.module, one.name, (mode,), variant=variant, **sizes)
    return ClassProof(task, load_sizes(), 600.0).prove(mode)


def test_every_class_that_the_rewrite_changes_speaks_of_experts(classes: dict[str, PlanClass]) -> None:
    edited = {(change.path, edit.class_name) for change in plan_rewrites([MODELS]).changes for edit in change.edits}
    named = {(one.path, one.name): one for one in classes.values()}
    own = [named[key] for key in edited if key in named]
    assert len(own) > 60
    assert all(one.has_experts for one in own)
    assert not classes["LlamaConfig"].has_experts


@pytest.mark.parametrize(
    ("name", "variant", "mode", "outcome", "why"),
    [
        ("Qwen3VLMoeTextConfig", "", "tp", "passed", ""),
        ("Ernie4_5_VLMoeTextConfig", "", "ep", "passed", ""),
        ("NemotronHConfig", "", "ep", "passed", ""),
        ("MixtralConfig", "", "tp_ep", "passed", ""),
        ("LlamaConfig", "", "tp", "passed", ""),
        ("InklingTextConfig", "", "tp_ep", "passed", ""),  # its sharded embedding holds a norm
        ("InklingTextConfig", "", "tp", "refused", "gate and up lie one after the other"),
        ("Glm5NextTextConfig", "", "tp", "refused", "o_proj takes a sharded input, but nothing beside it"),
        ("Glm5NextTextConfig", "no linear attention", "tp", "passed", ""),
        ("ZayaConfig", "", "tp", "no plan", "no tp plan"),
        ("Llama4TextConfig", "", "tp_ep", "no plan", "no ep plan"),
        ("MixtralConfig", "", "sp", "no plan", "no sp plan"),
        ("HYV4Config", "", "tp", "passed", ""),  # its hyper-connections are computed in float32
        ("HYV4VLTextConfig", "", "ep", "passed", ""),
    ],
)
def test_a_row(name: str, variant: str, mode: Mode, outcome: str, why: str, classes: dict[str, PlanClass]) -> None:
    result = prove(classes[name], mode, variant)
    assert result.outcome == outcome, result
    assert why in result.why
    if outcome == "passed":
        assert result.sharded > 0
        assert result.logits is not None
        assert result.gradients is not None
        assert max(result.logits, result.gradients) < 1e-10


LARGE: tuple[tuple[Mode, dict[str, int]], ...] = (
    ("tp_ep", {"tp": 16, "ep": 32, "fsdp": 4}),
    ("tp_ep", {"tp": 64, "ep": 64}),
    ("ep", {"tp": 64, "ep": 64}),
    ("tp_ep", {"tp": 8, "ep": 16, "fsdp": 2}),
)
LARGE_ROWS = [
    pytest.param(name, *row, marks=() if name == "Qwen3MoeConfig" and row == LARGE[-1] else pytest.mark.full)
    for name in ("Qwen3MoeConfig", "DeepseekV3Config", "Glm4MoeConfig", "MixtralConfig", "GptOssConfig")
    for row in LARGE
]


@pytest.mark.parametrize(("name", "mode", "sizes"), LARGE_ROWS)
def test_a_large_mesh(name: str, mode: Mode, sizes: dict[str, int], classes: dict[str, PlanClass]) -> None:
    result = prove(classes[name], mode, **sizes)
    assert result.outcome == "passed", result


def test_ranks_share_the_memory_of_weights_and_leave_them_as_they_are(
    classes: dict[str, PlanClass], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = classes["Qwen3MoeConfig"]
    proof = ClassProof(ProofTask(one.module, one.name, ("tp",), fsdp=2), load_sizes(), 600.0)
    before = {name: value.clone() for name, value in proof._model.state_dict().items()}
    places = {value.data_ptr() for value in proof._model.parameters()}
    copies: list[bool] = []

    def parallelize_copy(model: Any, *arguments: Any) -> Any:
        copies.append({value.data_ptr() for value in model.parameters()} == places)
        return parallelize(model, *arguments)

    monkeypatch.setattr(compare, "parallelize", parallelize_copy)
    assert proof.prove("tp").outcome == "passed"
    assert copies == [True] * len(copies) != []
    assert all(torch.equal(value, before[name]) for name, value in proof._model.state_dict().items())


def test_entries_that_the_class_forgets_are_named(classes: dict[str, PlanClass]) -> None:
    added = prove(classes["Qwen3VLMoeTextConfig"], "tp").added
    assert added == ("layers.*.self_attn.k_norm", "layers.*.self_attn.q_norm")


def test_a_wrong_plan_is_found_wrong(classes: dict[str, PlanClass], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a plan sum part of a gradient that is whole already, as if nothing was known of layers that go together."""
    one = classes["DeepseekV2Config"]
    config_class = getattr(import_module(one.module), one.name)
    latents = {"layers.*.self_attn.q_a_proj": "mla_kv_a_proj"}
    monkeypatch.setattr(config_class, "base_model_tp_plan", config_class.base_model_tp_plan | latents)
    monkeypatch.setattr("runtime.checks.plan.check_pairs", lambda view: None)
    result = prove(one, "tp")
    assert result.outcome == "differs", result
    assert "q_a_proj" in result.why


@pytest.mark.parametrize(
    ("name", "mode", "sizes", "batches"),
    [
        ("Qwen3MoeConfig", "tp", {"tp": 2, "fsdp": 2, "replicate": 2}, 4),
        ("Qwen3MoeConfig", "ep", {"ep": 2, "replicate": 3}, 3),
        ("DeepseekV3Config", "tp_ep", {"tp": 1, "ep": 2, "fsdp": 2, "replicate": 2}, 2),
        pytest.param(
            "Glm4MoeConfig", "tp_ep", {"tp": 2, "ep": 4, "fsdp": 4, "replicate": 2}, 4, marks=pytest.mark.full
        ),
    ],
)
def test_replicas_pass_with_batches_of_their_own(
    name: str,
    mode: Mode,
    sizes: dict[str, int],
    batches: int,
    classes: dict[str, PlanClass],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given: list[Any] = []

    def run_reference(model: Any, inputs: Any, *forced: Any) -> compare.Reference:
        given.append([batch["input_ids"] for batch in inputs])
        return compare.run_reference(model, inputs, *forced)

    monkeypatch.setattr("runtime.proving.prove.run_reference", run_reference)
    result = prove(classes[name], mode, **sizes)
    assert result.outcome == "passed", result
    assert len({tuple(tokens.flatten().tolist()) for tokens in given[0]}) == len(given[0]) == batches


@pytest.mark.parametrize(("mode", "ep", "work"), [("tp", 2, "1, 3"), ("ep", 3, "1, 2"), ("tp_ep", 4, "1, 3")])
def test_a_mesh_that_the_model_cannot_have_is_refused_with_sizes_that_work(mode: Mode, ep: int, work: str) -> None:
    sizes = {"hidden_size": 24, "head_dim": 8, "num_hidden_layers": 1, "num_attention_heads": 3, "num_experts": 2}
    module = "transformers.models.qwen3_moe.configuration_qwen3_moe"
    config = {**sizes, "num_key_value_heads": 3, "vocab_size": 96, "num_experts_per_tok": 1}
    task = ProofTask(module, "Qwen3MoeConfig", (mode,), ep=ep, fsdp=2, replicate=2, config=config)
    result = ClassProof(task, load_sizes(), 600.0).prove(mode)
    assert (result.outcome, result.hint) == ("does not fit", f"sizes that work: {work}"), result


def test_more_replicas_than_threads_can_be_are_refused_before_anything_runs(classes: dict[str, PlanClass]) -> None:
    result = prove(classes["Qwen3MoeConfig"], "tp", replicate=50_000)
    assert (result.outcome, result.hint) == ("does not fit", "use a smaller mesh")
    assert result.why.startswith("100,000 ranks are too many for threads of one process")


@pytest.mark.parametrize(
    ("defect", "module"),
    [
        ("not reduced over replicas", "layers.1"),
        ("not reduced over replicas", "layers.2.mlp.experts"),
        ("divided by the expert group's size", "layers.2.mlp.experts"),
        ("summed", "layers.1"),
        ("summed", "layers.2.mlp.experts"),
    ],
)
def test_gradients_that_replicas_do_not_share_are_found_by_name(
    defect: str, module: str, classes: dict[str, PlanClass], monkeypatch: pytest.MonkeyPatch
) -> None:
    def parallelize_with_defect(model: Any, *args: Any) -> None:
        parallelize(model, *args)
        DEFECTS[defect](model, f"model.{module}", Mesh(ep=2, fsdp=2, replicate=2))

    monkeypatch.setattr(compare, "parallelize", parallelize_with_defect)
    result = prove(classes["Qwen3MoeConfig"], "tp_ep", tp=1, ep=2, fsdp=2, replicate=2)
    assert result.outcome == "differs", result
    assert result.worst.startswith(f"model.{module}."), result
    assert f"gradient of {result.worst} by" in result.why
    assert result.logits is not None
    assert result.logits < 1e-10


@pytest.mark.parametrize(
    ("family", "replicate"),
    [*((family, 1) for family in SEQUENCE_PLANS), pytest.param("mixtral", 2, marks=pytest.mark.full)],
)
def test_sequence_parallel_plans_that_configs_carry_pass(
    family: str, replicate: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (one,) = find_plan_classes(
        [fork_with_sequence_plan(tmp_path, family, SEQUENCE_PLANS[family], f"sequence_{family}")]
    )
    proof = ClassProof(ProofTask(one.module, one.name, ("sp", "sp_ep"), replicate=replicate), load_sizes(), 600.0)
    for mode in ("sp", "sp_ep"):
        result = proof.prove(mode)
        assert result.outcome == "passed", result
        assert result.sharded > 6
        assert result.added == ()


def test_a_norm_that_a_sequence_parallel_plan_forgets_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    plan = {key: style for key, style in SEQUENCE_PLANS["mixtral"].items() if key != "layers.*.input_layernorm"}
    (one,) = find_plan_classes([fork_with_sequence_plan(tmp_path, "mixtral", plan, "forgetful_mixtral")])
    result = prove(one, "sp")
    assert result.outcome in ("refused", "differs"), result
    assert "input_layernorm" in result.why
