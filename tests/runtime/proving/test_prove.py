"""A sample of `make sweep`: plans of the installed transformers proven, refused and found wrong, in this process."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest
import transformers

from codemods.rewriting.migrate import plan_rewrites
from codemods.tree.plan_classes import PlanClass, find_plan_classes
from plans.mesh import Mode
from runtime.proving.prove import ClassProof
from runtime.proving.sizes import load_sizes
from runtime.proving.task import ModeResult, ProofTask
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


@pytest.mark.parametrize("family", SEQUENCE_PLANS)
def test_sequence_parallel_plans_that_configs_carry_pass(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (one,) = find_plan_classes(
        [fork_with_sequence_plan(tmp_path, family, SEQUENCE_PLANS[family], f"sequence_{family}")]
    )
    proof = ClassProof(ProofTask(one.module, one.name, ("sp", "sp_ep")), load_sizes(), 600.0)
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
