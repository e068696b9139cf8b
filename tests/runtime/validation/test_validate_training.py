"""Gradients as in training: a batch for each group of ranks, small gradients compared, and what is not exercised."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from plans.errors import MissingPlanError
from plans.mesh import Mesh, Mode
from runtime.validation.inputs import count_batches, find_batch, sample_batches
from runtime.validation.request import ValidationRequest
from tests.runtime.rank_pool import RankPool
from tests.runtime.validation import validation_cases
from tests.tiny_models import DENSE, ODD_MODELS, tiny_config, tiny_model, with_noise

HubFolder = Callable[[str], Path]


@pytest.mark.parametrize(
    ("mesh", "batches"),
    [
        (Mesh(tp=2), [0, 0]),
        (Mesh(fsdp=2), [0, 1]),
        (Mesh(tp=2, fsdp=2), [0, 0, 1, 1]),
        (Mesh(tp=2, ep=2, fsdp=2), [0, 0, 1, 1]),
        (Mesh(tp=1, ep=2, fsdp=4), [0, 0, 1, 1]),
        (Mesh(tp=2, ep=4, fsdp=2), [0, 0, 0, 0]),
        (Mesh(tp=2, replicate=2), [0, 0, 1, 1]),
        (Mesh(tp=2, ep=4, fsdp=2, replicate=2), [0, 0, 0, 0, 1, 1, 1, 1]),
    ],
    ids=str,
)
def test_ranks_that_compute_together_share_a_batch(mesh: Mesh, batches: list[int]) -> None:
    assert [find_batch(mesh, rank) for rank in range(mesh.world_size)] == batches
    assert count_batches(mesh) == batches[-1] + 1


def test_tokens_come_from_everywhere_in_the_vocabulary_but_stand_for_text(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**DENSE, image_token_id=7)
    model = transformers.LlamaForCausalLM(config)
    for mesh in (Mesh(fsdp=4), Mesh(tp=2, fsdp=2)):
        batches = sample_batches(model, ValidationRequest(tmp_path, mesh))
        tokens = torch.cat([batch.tokens.flatten() for batch in batches])
        assert 7 not in tokens
        width = -(-config.vocab_size // mesh.world_size)
        assert {int(token) // width for token in tokens} == set(range(mesh.world_size))
        assert len({tuple(batch.tokens.flatten().tolist()) for batch in batches}) == len(batches)


@pytest.mark.parametrize("defect", ["not reduced", "summed"])
@pytest.mark.parametrize("name", ["model.layers.1", ""], ids=["layer", "root"])
def test_a_reduction_over_data_ranks_that_is_missing_or_a_sum(
    defect: str, name: str, two_ranks: RankPool, hub_folder: HubFolder
) -> None:
    found = two_ranks.run(validation_cases.with_defect, defect, name, hub_folder("llama"), Mesh(fsdp=2))[0]
    assert {part for part in validation_cases.PARTS if found[part]["mismatches"]} == {"backward"}
    wrong = {row["name"] for row in found["backward"]["mismatches"]}
    expected = "model.layers.1.self_attn.q_proj.weight" if name else "model.embed_tokens.weight"
    assert expected in wrong
    assert all(row.startswith("model.layers.1.") == bool(name) for row in wrong)


@pytest.mark.parametrize("defect", ["divided by the world size", "summed", "not reduced"])
def test_gradients_of_experts_that_another_group_reduces(
    defect: str, four_ranks: RankPool, hub_folder: HubFolder
) -> None:
    name, mesh = "model.layers.2.mlp.experts", Mesh(ep=2, fsdp=4)
    assert mesh.efsdp == 2
    found = four_ranks.run(validation_cases.with_defect, defect, name, hub_folder("qwen3_moe"), mesh, "tp_ep")[0]
    assert {row["name"].rpartition(".")[0] for row in found["backward"]["mismatches"]} == {name}


@pytest.mark.parametrize(
    ("defect", "name"),
    [
        ("not reduced over replicas", "model.layers.1"),
        ("not reduced over replicas", "model.layers.2.mlp.experts"),
        ("divided by the expert group's size", "model.layers.2.mlp.experts"),
        ("summed", "model.layers.1"),
    ],
)
def test_gradients_that_replicas_do_not_share(
    defect: str, name: str, four_ranks: RankPool, hub_folder: HubFolder
) -> None:
    mesh = Mesh(ep=2, fsdp=2, replicate=2)
    found = four_ranks.run(validation_cases.with_defect, defect, name, hub_folder("qwen3_moe"), mesh, "tp_ep")[0]
    assert {part for part in validation_cases.PARTS if found[part]["mismatches"]} == {"backward"}
    assert all(row["name"].startswith(f"{name}.") for row in found["backward"]["mismatches"])
    assert (found["backward"]["batches"], found["content"]["mismatches"]) == (2, [])


@pytest.mark.parametrize(
    ("name", "mode", "defect", "parameter"),
    [
        ("gpt_oss", "ep", "turned", "model.layers.1.mlp.router.bias"),
        ("gpt_oss", "ep", "doubled", "model.layers.0.self_attn.sinks"),
        ("qwen2", "tp", "doubled", "model.layers.1.input_layernorm.weight"),
        ("qwen2", "tp", "doubled", "model.layers.0.self_attn.k_proj.bias"),
        ("qwen3_moe", "tp", "doubled", "model.layers.0.mlp.gate.weight"),
    ],
)
def test_small_gradients_that_are_wrong(
    name: str, mode: Mode, defect: str, parameter: str, two_ranks: RankPool, hub_folder: HubFolder
) -> None:
    mesh = Mesh(tp=2, ep=2 if mode == "ep" else 1)
    found = two_ranks.run(validation_cases.with_defect, defect, parameter, hub_folder(name), mesh, mode)[0]
    assert found["backward"]["precision"] == "float64"
    assert {row["name"] for row in found["backward"]["mismatches"]} == {parameter}


def test_a_layer_that_the_model_has_no_place_for_is_not_proven(
    two_ranks: RankPool, hub_folder: HubFolder, tmp_path: Path
) -> None:
    model = tiny_model(tiny_config("qwen2"))
    model.save_pretrained(tmp_path / "hub")
    config = json.loads((tmp_path / "hub" / "config.json").read_text())
    short = {"num_hidden_layers": 2, "layer_types": config["layer_types"][:2]}
    (tmp_path / "hub" / "config.json").write_text(json.dumps(config | short))
    found = two_ranks.run(validation_cases.validate, tmp_path / "hub")[0]
    assert found["verdict"] == "not fully proven"
    names = {name for name in model.state_dict() if name.startswith("model.layers.2.")}
    assert {row["name"] for row in found["unexercised"]} == names
    accepted = two_ranks.run(validation_cases.validate_allowing, tmp_path / "hub", ("model.layers.2.*",))[0]
    assert accepted["verdict"] == "proven"
    assert all(row["allowed"] for row in accepted["unexercised"])
    partly = two_ranks.run(validation_cases.validate_allowing, tmp_path / "hub", ("*.self_attn.*",))[0]
    assert partly["verdict"] == "not fully proven"


def test_a_second_input_reaches_experts_that_few_tokens_do_not(two_ranks: RankPool, tmp_path: Path) -> None:
    family, sizes = ODD_MODELS["six_experts"]
    config = getattr(transformers, family)(**{**sizes, "num_local_experts": 32, "num_experts_per_tok": 1})
    tiny_model(config).save_pretrained(tmp_path / "hub")
    found = two_ranks.run(validation_cases.validate, tmp_path / "hub")[0]
    assert found["verdict"] == "proven", found["unexercised"]
    assert found["backward"]["inputs"] > 1


@pytest.mark.parametrize("mode", ["tp", "ep"])
def test_an_expert_that_its_router_never_chooses_is_reached_by_force(
    mode: Mode, two_ranks: RankPool, tmp_path: Path
) -> None:
    mesh = Mesh(tp=2, ep=2 if mode == "ep" else 1)
    model = tiny_model(tiny_config("deepseek_v3"))
    for layer in model.model.layers[1:]:
        layer.mlp.gate.e_score_correction_bias[5] = -1e4
    model.save_pretrained(tmp_path / "hub")
    found = two_ranks.run(validation_cases.validate, tmp_path / "hub", None, mesh, mode)[0]
    assert (found["verdict"], found["backward"]["forced_routing"]) == ("proven", True), found


def test_an_expert_that_cannot_be_reached_is_named(two_ranks: RankPool, tmp_path: Path) -> None:
    model = tiny_model(tiny_config("deepseek_v3"))
    model.model.layers[2].mlp.gate.e_score_correction_bias[5] = -1e4
    model.save_pretrained(tmp_path / "hub")
    found = two_ranks.run(validation_cases.validate, tmp_path / "hub", None, Mesh(tp=2), "sp")[0]
    assert (found["verdict"], found["backward"]["forced_routing"]) == ("not fully proven", False)
    assert {(row["name"], row["reason"]) for row in found["unexercised"]} == {
        (f"model.layers.2.mlp.experts.{part}", "no gradient for expert 5") for part in ("gate_up_proj", "down_proj")
    }


def test_positions_that_no_token_has_are_named_with_their_rank(two_ranks: RankPool, tmp_path: Path) -> None:
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": 101, "n_positions": 4096}
    tiny_model(transformers.GPT2Config(**sizes)).save_pretrained(tmp_path / "hub")
    found = two_ranks.run(validation_cases.validate, tmp_path / "hub", None, Mesh(fsdp=2))[0]
    assert found["verdict"] == "not fully proven"
    assert [(row["name"], row["ranks"]) for row in found["unexercised"]] == [("transformer.wpe.weight", [1])]


def test_a_model_without_a_plan_is_proven_over_data_ranks(two_ranks: RankPool, tmp_path: Path) -> None:
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": 101, "n_positions": 64}
    tiny_model(transformers.GPT2Config(**sizes)).save_pretrained(tmp_path / "hub")
    found = two_ranks.run(validation_cases.validate, tmp_path / "hub", None, Mesh(fsdp=2))[0]
    assert found["verdict"] == "proven", found
    assert found["backward"]["batches"] == 2
    with pytest.raises(MissingPlanError, match="GPT2LMHeadModel has no tensor parallel plan"):
        two_ranks.run(validation_cases.validate, tmp_path / "hub", None, Mesh(tp=2))


def test_gemma_4_runs_and_a_tower_without_inputs_is_named(two_ranks: RankPool, tmp_path: Path) -> None:
    hub = save_gemma_4(tmp_path / "hub")
    found = two_ranks.run(validation_cases.validate, hub)[0]
    assert (found["verdict"], found["failed"]) == ("not fully proven", {})
    # Inputs have images, but no sounds.
    assert {row["name"].split(".")[1] for row in found["unexercised"]} == {"audio_tower", "embed_audio"}


def test_models_that_do_not_fit_in_float64_are_compared_in_float32(two_ranks: RankPool, hub_folder: HubFolder) -> None:
    found = two_ranks.run(validation_cases.without_room_for_float64, hub_folder("qwen3_moe"))[0]
    assert found["verdict"] == "proven", found
    assert (found["forward"]["precision"], found["backward"]["precision"]) == ("float32", "float32")
    assert (found["backward"]["tolerance"], found["backward"]["floor"]) == (1e-4, 1e-2)


def save_gemma_4(folder: Path) -> Path:
    """Save a tiny Gemma 4 with two towers, and the embedding tied to the head, which its plan shards."""
    text = {
        **{key: value for key, value in DENSE.items() if key != "num_key_value_heads"},
        **{"num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 8, "num_global_key_value_heads": 2},
        **{"vocab_size_per_layer_input": 101, "hidden_size_per_layer_input": 4, "sliding_window": 8},
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    }
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "position_embedding_size": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8}
    tokens = {"image_token_id": 95, "boi_token_id": 96, "eoi_token_id": 97, "boa_token_id": 98, "audio_token_id": 94}
    audio = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "output_proj_dims": 32}
    towers = {"vision_config": vision | heads, "audio_config": audio | {"subsampling_conv_channels": [8, 4]}}
    config = transformers.Gemma4Config(text_config=text, eoa_token_index=99, video_token_id=93, **towers, **tokens)
    model = transformers.Gemma4ForConditionalGeneration(config)
    with_noise(model).save_pretrained(folder)
    return folder
