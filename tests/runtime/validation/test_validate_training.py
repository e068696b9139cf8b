"""Gradients as in training: a batch for each group of ranks, small gradients compared, and what is not exercised."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from plans.mesh import Mesh, Mode
from runtime.validation.inputs import count_batches, find_batch, sample_batches
from runtime.validation.request import ValidationRequest
from tests.runtime.rank_pool import RankPool
from tests.runtime.validation import validation_cases
from tests.tiny_models import DENSE, ODD_MODELS, tiny_config, tiny_model

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
