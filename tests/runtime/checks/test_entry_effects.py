"""Every plan entry has its effect or is refused, with the key that was probably meant."""

from __future__ import annotations

from typing import Any

import pytest
import transformers

from plans.errors import PlanError, UnmatchedKeyError
from plans.mesh import Mesh
from plans.placement import Replicate, Shard
from runtime import Plan
from runtime.models.model import meta_model
from runtime.planning.resolve import resolve
from tests.runtime.checks import wrong_entry_cases
from tests.tiny_models import tiny_config

ATTENTION, MLP = "model.layers.*.self_attn", "model.layers.*.mlp"


def build(name: str, architecture: str = "", **changes: object) -> Any:
    config = tiny_config(name)
    for key, value in changes.items():
        setattr(config, key, value)
    config.architectures = [architecture or f"{type(config).__name__.removesuffix('Config')}ForCausalLM"]
    return meta_model(config)


def add(model: Any, entries: dict[str, str]) -> dict[str, str]:
    return {**Plan.from_model(model, "tp").entries, **entries}


def refuse(model: Any, entries: dict[str, str]) -> PlanError:
    with pytest.raises(PlanError) as caught:
        resolve(model, Mesh(tp=2), plan=entries)
    return caught.value


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("layers.*.mlp.experts.down_proj", f"{MLP}.experts.down_proj"),  # its prefix is missing
        ("layers.0.mlp.experts.down_proj", "model.layers.0.mlp.experts.down_proj"),
        ("experts.down_proj", f"{MLP}.experts.down_proj"),
        ("model.model.layers.*.self_attn.q_proj", f"{ATTENTION}.q_proj"),  # one prefix too many
        ("transformer.layers.*.self_attn.q_proj", f"{ATTENTION}.q_proj"),
        ("model.layers.*.experts.down_proj", f"{MLP}.experts.down_proj"),  # a part in the middle is missing
        ("model.layers.*.self_attn.o", f"{ATTENTION}.o_proj"),  # the end of its name is missing
        ("model.layers.*.self_attn.*.q_proj", f"{ATTENTION}.q_proj"),  # a wildcard that matches nothing
        ("model.layers.9.self_attn.q_proj", "model.layers.0.self_attn.q_proj"),
        ("model.lm_head", "lm_head"),
        ("embed_tokens", "model.embed_tokens"),
    ],
)
def test_an_entry_that_matches_nothing_is_refused_with_the_near_key(key: str, near: str) -> None:
    model = build("olmoe")
    error = refuse(model, add(model, {key: "replicate"}))
    assert isinstance(error, UnmatchedKeyError)
    assert f"the plan entry {key!r} matches nothing in OlmoeForCausalLM" in error.message
    assert error.hint == f"did you mean {near!r}? correct or remove the entry"
    assert near in add(model, {near: ""})


def test_the_near_key_has_the_effect_that_was_wanted() -> None:
    model = build("olmoe")
    near = refuse(model, add(model, {"lm_head.weights": "replicate"})).data["near"]
    assert near == "lm_head.weight"
    error = refuse(model, add(model, {"head": "replicate"}))
    assert error.data["near"] == "lm_head"
    before, after = (resolve(model, Mesh(tp=2), plan=add(model, new)) for new in ({}, {"lm_head": "replicate"}))
    assert [resolved.by_name["lm_head.weight"].placements[-1] for resolved in (before, after)] == [
        Shard(0),
        Replicate(),
    ]


def test_a_model_without_head_has_keys_without_the_prefix() -> None:
    model = build("olmoe", "OlmoeModel")
    error = refuse(model, add(model, {f"{ATTENTION}.q_proj": "replicate"}))
    assert error.hint == "did you mean 'layers.*.self_attn.q_proj'? correct or remove the entry"


def test_nothing_is_suggested_where_nothing_is_similar() -> None:
    model = build("olmoe")
    assert refuse(model, {"zzz": "colwise"}).hint == "correct or remove the entry"


def test_an_entry_for_dense_layers_of_a_sparse_model_needs_a_declared_plan() -> None:
    """Qwen3's own plans name the parts of its dense layers; DeepSeek's have both forms of its queries."""
    sparse = build("qwen3_moe", mlp_only_layers=[])
    declared = {f"{MLP}.{name}" for name in ("gate_proj", "up_proj", "down_proj")}
    assert set(resolve(sparse, Mesh(tp=2)).unmatched) == declared
    latent = build("deepseek_v3", "DeepseekV3ForCausalLM")  # whose classes could have q_proj, but not with this config
    assert latent.config.q_lora_rank
    error = refuse(latent, add(latent, {f"{ATTENTION}.q_proj": "colwise"}))
    assert "this configuration has no such module" in error.message
    assert error.hint == f"did you mean {ATTENTION + '.q_a_proj'!r}? correct or remove the entry"


def test_a_second_entry_of_transformers_counts_only_as_transformers_wrote_it() -> None:
    model = wrong_entry_cases.composite("llama4")
    entries = dict(Plan.from_model(model, "tp").entries)
    key = "language_model.layers.*.self_attn.q_proj"
    resolve(model, Mesh(tp=2), plan=entries)
    error = refuse(model, {**entries, key: "replicate"})
    assert error.hint == "did you mean 'language_model.model.layers.*.self_attn.q_proj'? correct or remove the entry"


@pytest.mark.parametrize(
    ("entries", "reason", "hint"),
    [
        (
            dict.fromkeys((f"model.layers.{layer}.self_attn.q_norm" for layer in range(3)), "replicate")
            | {f"{ATTENTION}.q_norm": "replicate"},
            "what it names has entries of its own, 'model.layers.0.self_attn.q_norm'",
            "remove the entry, or those that take precedence",
        ),
        (
            {f"{MLP}.gate": "replicate", f"{MLP}.gate.weight": "replicate"},
            "what it names has entries of its own, 'model.layers.*.mlp.gate.weight'",
            "remove the entry, or those that take precedence",
        ),
        (
            {"model.norm.weight": "moe_experts_allreduce"},
            "it names a parameter, which 'moe_experts_allreduce' does not place",
            "name its module, 'model.norm', or choose a style that places parameters",
        ),
        (
            {"model.layers.*": "replicate"},
            "what it names has no parameters of its own, and 'replicate' does nothing around its forward",
            "an entry does not reach below the module it names: name modules in it, such as "
            "'model.layers.*.input_layernorm', 'model.layers.*.mlp.experts', "
            "'model.layers.*.mlp.gate' and 7 more",
        ),
        (
            {MLP: "replicate"},
            "what it names has no parameters of its own, and 'replicate' does nothing around its forward",
            "an entry does not reach below the module it names: name modules in it, such as "
            "'model.layers.*.mlp.experts', 'model.layers.*.mlp.gate'",
        ),
        (
            {f"{MLP}.experts.act_fn": "replicate"},
            "'replicate' neither places what it names nor does anything around its forward",
            "choose another style, or remove the entry",
        ),
    ],
    ids=["numbered", "parameter", "style of modules", "container", "module", "without parameters"],
)
def test_an_entry_without_effect_is_refused(entries: dict[str, str], reason: str, hint: str) -> None:
    model = build("olmoe")
    error = refuse(model, add(model, entries))
    assert f"has no effect: {reason}" in error.message
    assert error.hint == hint


def test_the_entry_that_is_left_has_the_effect() -> None:
    model = build("olmoe")
    for left in (f"{MLP}.gate", f"{MLP}.gate.weight"):
        row = resolve(model, Mesh(tp=2), plan=add(model, {left: "replicate"})).by_name["model.layers.0.mlp.gate.weight"]
        assert (row.key, row.placements[-1]) == (left, Replicate())


def test_entries_of_some_layers_leave_an_effect_to_the_wildcard() -> None:
    model = build("llama")
    key = "model.layers.1.self_attn.q_proj"
    resolved = resolve(model, Mesh(tp=2), plan=add(model, {key: "colwise"}))
    assert resolved.by_name[f"{key}.weight"].key == key


@pytest.mark.parametrize("name", ["OlmoeConfig", "Gemma3nTextConfig", "Qwen3NextConfig"])
def test_plans_of_default_configs_have_effects(name: str) -> None:
    config = getattr(transformers, name)()
    config.architectures = [f"{name.removesuffix('Config').removesuffix('Text')}ForCausalLM"]
    model = meta_model(config)
    assert resolve(model, Mesh(), plan=Plan.from_model(model, "tp")).parameters
