"""Norms on heads that a plan lacks: refused by name in an explicit plan, added to a chosen one."""

from __future__ import annotations

import pytest
import transformers

from plans.errors import PlanError
from plans.mesh import Mesh, Mode
from runtime.checks.head_parameters import add_head_norm_entries
from runtime.checks.plan_view import PlanView
from runtime.models.model import meta_model
from runtime.planning.plan import Plan, get_released_plan, runtime_dialect
from runtime.planning.resolve import resolve
from tests.runtime.checks import odd_cases
from tests.runtime.rank_pool import RankPool
from tests.tiny_models import DENSE, MODELS

NORMS = {f"model.layers.*.self_attn.{name}_norm": "replicated_with_grad_allreduce" for name in "qk"}


@pytest.fixture
def glm():
    """GLM-4.5 with norms on heads, which the plan of its class lacks."""
    _, sizes = MODELS["glm4_moe"]
    config = transformers.Glm4MoeConfig(**sizes, use_qk_norm=True, architectures=["Glm4MoeForCausalLM"])
    return meta_model(config)


def test_the_plan_of_a_model_is_completed(glm):
    declared = get_released_plan(glm)
    assert declared.keys().isdisjoint(NORMS)
    chosen = Plan.from_model(glm, "tp").entries
    assert {key: chosen[key] for key in NORMS} == NORMS
    assert chosen.keys() - declared.keys() == NORMS.keys()
    assert resolve(glm, Mesh(tp=2)).plan == chosen


def test_an_explicit_plan_without_them_is_refused_with_the_entry_that_is_missing(two_ranks: RankPool):
    with pytest.raises(PlanError, match=r"model\.layers\.0\.self_attn\.q_norm is whole but") as caught:
        two_ranks.run(odd_cases.parallelize_norms_on_heads, {})
    assert "'model.layers.*.self_attn.q_norm': 'replicated_with_grad_allreduce'" in caught.value.hint


def test_an_explicit_plan_with_them_is_taken(two_ranks: RankPool):
    assert two_ranks.run(odd_cases.parallelize_norms_on_heads, NORMS) == [None, None]


def test_a_style_that_leaves_the_gradient_partial_is_refused_too(two_ranks: RankPool):
    with pytest.raises(PlanError, match=r"model\.layers\.0\.self_attn\.q_norm is whole but"):
        two_ranks.run(odd_cases.parallelize_norms_on_heads, dict.fromkeys(NORMS, "replicate"))


@pytest.mark.parametrize("name", ["deepseek_v3", "qwen3_moe", "olmoe", "mixtral"])
def test_norms_of_latents_of_whole_projections_and_those_with_entries_are_left_alone(name):
    class_name, sizes = MODELS[name]
    config = getattr(transformers, class_name)(**sizes)
    config.architectures = [class_name.replace("Config", "ForCausalLM")]
    plan = get_released_plan(meta_model(config))
    assert add_head_norm_entries(PlanView(meta_model(config), plan, runtime_dialect())) == plan


def test_layer_norms_on_heads_are_found_in_dense_models_too():
    config = transformers.PhiConfig(**DENSE, qk_layernorm=True, architectures=["PhiForCausalLM"])
    chosen = Plan.from_model(meta_model(config), "tp").entries
    added = {key for key in chosen if key.endswith("_layernorm")}
    assert added == {f"model.layers.*.self_attn.{name}_layernorm" for name in "qk"}


@pytest.mark.parametrize("mode", ["tp", "sp"])
def test_activations_with_parameters_get_whole_gradients(mode: Mode, two_ranks: RankPool):
    for errors in two_ranks.run(odd_cases.activation_gradient_errors, mode):
        assert len(errors) == 6
        assert max(errors.values()) < 1e-5, errors
