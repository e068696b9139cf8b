"""Which of a model's plans a mode applies, and what is derived or combined if the model has none."""

from __future__ import annotations

from typing import Any

import pytest

from plans.errors import PlanError, UsageError
from plans.mesh import Mesh
from plans.placement import Packed, Shard
from runtime import Plan
from runtime.find_config import find_config
from runtime.models.model import meta_model
from runtime.planning.plan import convert_to_param_level, get_released_plan
from runtime.planning.resolve import resolve
from tests.tiny_models import tiny_config

EXPERTS = "model.layers.*.mlp.experts"
CUT_EXPERTS = {
    f"{EXPERTS}.gate_up_proj": "moe_tp_gate_up_colwise",
    f"{EXPERTS}.down_proj": "moe_tp_down_rowwise",
    EXPERTS: "moe_tp_experts",
}
WHOLE_EXPERTS = {
    f"{EXPERTS}.gate_up_proj": "grouped_gemm",
    f"{EXPERTS}.down_proj": "grouped_gemm",
    EXPERTS: "ep_dispatch_experts",
}


def model(name: str, **changes: object) -> Any:
    """Return a tiny model on meta."""
    config = tiny_config(name)
    for attribute, value in changes.items():
        setattr(config, attribute, value)
    config.architectures = [find_config(config.model_type).architectures[0]]
    return meta_model(config)


def test_an_explicit_plan_wins_in_every_mode_and_is_a_copy() -> None:
    explicit = {"model.layers.*.self_attn.q_proj": "colwise"}
    for mode in ("tp", "ep", "tp_ep", "sp", "sp_ep"):
        chosen = Plan.from_model(model("qwen3_moe"), mode, explicit)
        assert (chosen.mode, chosen.entries) == (mode, explicit)
        assert chosen.entries is not explicit
    explicit["lm_head"] = "colwise_gather_output"
    assert "lm_head" not in chosen.entries


def test_an_empty_explicit_plan_wins_too() -> None:
    assert Plan.from_model(model("qwen3_moe"), "tp", {}).entries == {}


def test_tp_is_the_param_level_form_of_the_models_plan() -> None:
    entries = Plan.from_model(model("qwen3_moe"), "tp").entries
    assert entries.items() >= CUT_EXPERTS.items()
    assert entries["model.layers.*.self_attn.q_proj"] == "colwise"
    assert entries["lm_head"] == "colwise_gather_output"


def test_ep_falls_back_to_the_models_expert_plan_alone() -> None:
    assert Plan.from_model(model("qwen3_moe"), "ep").entries == WHOLE_EXPERTS
    assert set(Plan.from_model(model("gpt_oss"), "ep").entries.values()) == {"grouped_gemm", "ep_dispatch_experts"}


@pytest.mark.parametrize("mode", ["tp_ep", "sp_ep"])
def test_a_combination_drops_entries_that_would_shard_within_experts(mode: Any) -> None:
    entries = Plan.from_model(model("qwen3_moe"), mode).entries
    assert entries.items() >= WHOLE_EXPERTS.items()
    assert not [style for style in entries.values() if style.startswith("moe_tp_")]
    assert entries["model.layers.*.self_attn.q_proj"] == "colwise"


def test_a_combination_keeps_shared_experts_of_the_dense_plan() -> None:
    entries = Plan.from_model(model("deepseek_v3"), "tp_ep").entries
    assert entries["model.layers.*.mlp.shared_experts.gate_proj"] == "colwise"
    assert entries["model.layers.*.mlp.shared_experts.down_proj"] == "rowwise"


def test_an_expert_plan_that_names_not_every_parameter_leaves_none_sharded() -> None:
    """The branch strips leftover `moe_tp_*` entries even where the expert plan does not name their parameter."""
    partial = {"layers.*.mlp.experts.gate_up_proj": "grouped_gemm", "layers.*.mlp.experts": "ep_dispatch_experts"}
    entries = Plan.from_model(model("qwen3_moe", base_model_ep_plan=partial), "tp_ep").entries
    assert f"{EXPERTS}.down_proj" not in entries


@pytest.mark.parametrize("mode", ["tp_ep", "sp_ep"])
def test_a_combined_plan_of_the_config_wins(mode: Any) -> None:
    combined = {"layers.*.mlp.experts": "ep_dispatch_experts"}
    chosen = Plan.from_model(model("qwen3_moe", **{f"base_model_{mode}_plan": combined}), mode)
    assert chosen.entries == {EXPERTS: "ep_dispatch_experts"}


def test_a_config_gives_the_plan_of_its_model() -> None:
    assert Plan.from_model(tiny_config("mixtral"), "tp_ep") == Plan.from_model(model("mixtral"), "tp_ep")


def test_a_config_is_not_changed() -> None:
    config = tiny_config("mixtral")
    before = config.to_dict()
    Plan.from_model(config, "sp")
    assert config.to_dict() == before


def test_a_models_own_sp_plan_wins_over_the_derived_one() -> None:
    declared = {"layers.*.input_layernorm": "activation"}
    chosen = Plan.from_model(model("qwen3_moe", base_model_sp_plan=declared), "sp")
    assert chosen.entries == {"model.layers.*.input_layernorm": "activation"}


def test_sparse_and_dense_layers_get_sequence_entries_with_their_numbers() -> None:
    entries = Plan.from_model(model("qwen3_moe"), "sp").entries
    assert {key: entries[key] for key in entries if key.endswith(".mlp")} == {
        "model.layers.0.mlp": "module_allgather_split",
        "model.layers.1.mlp": "module_allgather",
        "model.layers.2.mlp": "module_allgather_split",
    }
    assert entries["model.layers.*.mlp.down_proj"] == "rowwise_reduce_scatter"
    assert entries["model.layers.*.self_attn.o_proj"] == "rowwise_reduce_scatter"
    assert entries["model.layers.*.input_layernorm"] == "activation"
    assert entries["model.embed_tokens"] == "vocab_reduce_scatter"


def test_layers_that_agree_share_one_sequence_entry() -> None:
    entries = Plan.from_model(model("llama"), "sp").entries
    assert entries["model.layers.*.mlp"] == "module_allgather"
    assert not [key for key in entries if any(part.isdigit() for part in key.split("."))]


def test_parts_in_a_list_get_entries_of_their_own() -> None:
    entries = Plan.from_model(find_config("longcat_flash"), "sp").entries
    layer = "model.layers.*"
    assert entries[f"{layer}.input_layernorm.*"] == entries[f"{layer}.post_attention_layernorm.*"] == "activation"
    assert entries[f"{layer}.self_attn.*"] == entries[f"{layer}.mlps.*"] == "module_allgather"
    assert entries[f"{layer}.self_attn.*.o_proj"] == entries[f"{layer}.mlps.*.down_proj"] == "rowwise_reduce_scatter"
    assert entries[f"{layer}.mlp"] == "module_allgather_split"
    assert f"{layer}.mlps" not in entries


def test_shared_experts_are_part_of_the_block_that_gathers_and_splits() -> None:
    entries = Plan.from_model(model("deepseek_v3"), "sp").entries
    assert entries["model.layers.2.mlp"] == "module_allgather_split"
    assert entries["model.layers.*.mlp.shared_experts.down_proj"] == "rowwise"


def test_sp_places_every_parameter_as_tp_does() -> None:
    for name in ("qwen3_moe", "deepseek_v3", "laguna"):
        built = model(name)
        sp, tp = (resolve(built, Mesh(tp=2), mode).parameters for mode in ("sp", "tp"))
        differing = [row.name for row, tp_row in zip(sp, tp, strict=True) if row.placements != tp_row.placements]
        # The released plan leaves the embedding whole; sequence parallelism needs a sharded one.
        assert set(differing) <= {"model.embed_tokens.weight"}, name


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("doge", "DogeForCausalLM: .* model.layers.0 has parameters of its own"),
        ("gemma3n_text", "Gemma3nForCausalLM: .* model.embed_tokens_per_layer is not an embedding, a norm or the head"),
        ("qwen2_vl", "Qwen2VLModel: .* visual is not an embedding, a norm or the head"),
        ("t5gemma", "T5GemmaModel: .* 2 lists of layers, decoder.layers, encoder.layers"),
        ("gemma4_vision", "Gemma4VisionModel: .* does not declare which module embeds its input"),
    ],
)
def test_a_model_whose_stream_is_not_clear_is_refused_by_name(model_type: str, reason: str) -> None:
    with pytest.raises(PlanError, match=reason) as caught:
        Plan.from_model(find_config(model_type), "sp")
    assert "base_model_sp_plan" in caught.value.hint


@pytest.mark.parametrize(
    ("name", "mode", "message"),
    [
        ("llama", "ep", "LlamaForCausalLM has no expert parallel plan"),
        ("llama", "tp_ep", "LlamaForCausalLM has no expert parallel plan"),
        ("gpt_oss", "sp", "GptOssForCausalLM: .* its plan has entries for 0 lists of layers"),
    ],
)
def test_a_model_without_a_plan_for_the_mode_is_refused(name: str, mode: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Plan.from_model(model(name), mode)


def test_a_base_model_without_a_plan_is_refused() -> None:
    config = find_config("opt")
    config.architectures = ["OPTModel"]
    with pytest.raises(PlanError, match="OPTModel has no tensor parallel plan"):
        Plan.from_model(config, "tp")


def test_an_unknown_mode_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match="there is no mode 'pp'") as caught:
        Plan.from_model(model("llama"), "pp")  # type: ignore[arg-type]
    assert "tp, ep, tp_ep, sp, sp_ep" in caught.value.hint


def test_a_literal_layer_number_wins_over_the_wildcard() -> None:
    plan = {
        "model.layers.*.self_attn.o_proj": "colwise_gather_output",
        "model.layers.2.self_attn.o_proj": "rowwise_split_input",
        **CUT_EXPERTS,
        **{key.replace("*", "0"): style for key, style in WHOLE_EXPERTS.items()},
    }
    placed = resolve(model("qwen3_moe"), Mesh(tp=2), plan=plan).by_name
    assert placed["model.layers.1.self_attn.o_proj.weight"].placements[-1] == Shard(0)
    assert placed["model.layers.2.self_attn.o_proj.weight"].placements[-1] == Shard(1)
    assert placed["model.layers.2.self_attn.o_proj.weight"].key == "model.layers.2.self_attn.o_proj"
    assert placed["model.layers.0.mlp.experts.down_proj"].placements[-1] == Shard(0)
    assert placed["model.layers.2.mlp.experts.down_proj"].placements[-1] == Shard(2)


def test_a_plan_is_not_decomposed_for_another_layout() -> None:
    built = model("gpt_oss")
    plan = {f"{EXPERTS}.gate_up_proj": "packed_colwise", f"{EXPERTS}.down_proj": "rowwise"}
    assert convert_to_param_level(built, plan) == plan


def test_the_released_form_of_a_plan_places_experts_alike() -> None:
    built = model("qwen3_moe")
    placed = resolve(built, Mesh(tp=2), plan=get_released_plan(built)).by_name
    assert placed["model.layers.0.mlp.experts.gate_up_proj"].placements[-1] == Packed(1, 2)
