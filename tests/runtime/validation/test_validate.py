"""Rank files of real models validated on real gloo ranks, sound ones and damaged ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from plans.errors import IncompleteError, UsageError
from plans.mesh import Mesh
from runtime.checkpoint.resharding.execute import execute_reshard
from runtime.checkpoint.resharding.plan import plan_reshard
from tests.runtime import rank_cases
from tests.runtime.rank_pool import RankPool
from tests.runtime.validation import validation_cases
from tests.tiny_models import MODELS

HubFolder = Callable[[str], Path]
RankFolder = Callable[[str, int], Path]


@pytest.mark.parametrize("name", MODELS)
def test_two_ranks_compute_what_one_does(
    name: str, two_ranks: RankPool, hub_folder: HubFolder, rank_folder: RankFolder
) -> None:
    first, second = two_ranks.run(validation_cases.validate, rank_folder(name, 2), hub_folder(name))
    assert first == second
    assert first["ok"], first
    assert first["world_size"] == 2
    assert first["structure"]["checked"] > 20
    assert first["forward"]["max_abs_reference"] > 0.1
    assert first["forward"]["max_abs_diff"] <= 1e-5 * first["forward"]["max_abs_reference"]


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "llama"])
def test_four_ranks_compute_what_one_does(
    name: str, four_ranks: RankPool, hub_folder: HubFolder, rank_folder: RankFolder
) -> None:
    results = four_ranks.run(validation_cases.validate, rank_folder(name, 4), hub_folder(name))
    assert results[0]["ok"], results[0]
    assert results[1:] == results[:1] * 3


def test_without_a_reference_the_rank_files_are_reassembled(two_ranks: RankPool, rank_folder: RankFolder) -> None:
    result = two_ranks.run(validation_cases.validate, rank_folder("qwen3_moe", 2), None)[0]
    assert result["ok"], result


def test_gate_and_up_swapped_shows_in_content_and_logits(
    two_ranks: RankPool, hub_folder: HubFolder, rank_folder: RankFolder, tmp_path: Path
) -> None:
    folder = copied(rank_folder("mixtral", 2), tmp_path)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    for rank in (0, 1):
        edit_rank(folder, rank, lambda tensors: tensors.update({name: torch.cat(tensors[name].chunk(2, 1)[::-1], 1)}))
    result = two_ranks.run(validation_cases.validate, folder, hub_folder("mixtral"))[0]
    assert not result["ok"]
    assert [row["name"] for row in result["content"]["mismatches"]] == [name]
    assert result["forward"]["max_abs_diff"] > 100 * 1e-5 * result["forward"]["max_abs_reference"]


def test_exchanged_rank_files_are_found_even_without_a_reference(
    two_ranks: RankPool, rank_folder: RankFolder, tmp_path: Path
) -> None:
    folder = copied(rank_folder("mixtral", 2), tmp_path)
    one, other = sorted(folder.glob("rank-*"))
    one.rename(folder / "aside")
    other.rename(one)
    (folder / "aside").rename(other)
    result = two_ranks.run(validation_cases.validate, folder, None)[0]
    assert not result["ok"]
    # The vocabulary does not divide, so the files differ in shape and the header alone tells.
    [found] = result["content"]["mismatches"]
    assert "by the manifest" in found["found"]
    assert result["skipped"].keys() == {"structure", "forward", "backward", "generation"}


def test_pieces_exchanged_between_ranks_are_found_even_without_a_reference(
    two_ranks: RankPool, rank_folder: RankFolder, tmp_path: Path
) -> None:
    folder = copied(rank_folder("olmoe", 2), tmp_path)
    names = [f"model.layers.1.mlp.experts.{part}" for part in ("gate_up_proj", "down_proj")]
    pieces = [load_file(path) for path in sorted(folder.glob("rank-*"))]
    for rank, other in ((0, pieces[1]), (1, pieces[0])):
        edit_rank(folder, rank, lambda tensors, other=other: tensors.update({name: other[name] for name in names}))
    result = two_ranks.run(validation_cases.validate, folder, None)[0]
    # Ranks only sum, so the logits cannot tell.
    assert result["forward"]["ok"]
    assert not result["ok"]
    assert sorted(row["name"] for row in result["content"]["mismatches"]) == sorted(names)


def test_one_flipped_bit_is_named(two_ranks: RankPool, rank_folder: RankFolder, tmp_path: Path) -> None:
    folder = copied(rank_folder("olmoe", 2), tmp_path)
    path = folder / "rank-00001-of-00002.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    result = two_ranks.run(validation_cases.validate, folder, None)[0]
    assert not result["ok"]
    assert len(result["content"]["mismatches"]) == 1
    assert result["structure"]["mismatches"] == []


def test_damage_in_a_replica_is_named_with_its_rank(
    two_ranks: RankPool, rank_folder: RankFolder, tmp_path: Path
) -> None:
    folder = copied(rank_folder("olmoe", 2), tmp_path)
    name = "model.norm.weight"
    # The last bit of the first element, which logits tell in float64 only.
    edit_rank(folder, 1, lambda tensors: tensors[name].view(torch.int32)[:1].bitwise_xor_(1))
    result = two_ranks.run(validation_cases.validate, folder, None)[0]
    assert result["forward"]["max_abs_diff"] < 1e-5 * result["forward"]["max_abs_reference"]
    assert not result["ok"]
    assert [(row["name"], row["rank"]) for row in result["content"]["mismatches"]] == [(name, 1)]


def test_damage_in_a_module_that_does_not_run_is_named_with_its_rank(
    two_ranks: RankPool, llava_ranks: Path, tmp_path: Path
) -> None:
    folder = copied(llava_ranks, tmp_path)
    name = "model.vision_tower.embeddings.class_embedding"
    sound = two_ranks.run(validation_cases.validate, folder, None)[0]
    assert sound["verdict"] == "not fully proven"
    assert name in {row["name"] for row in sound["unexercised"]}
    assert all(row["name"].split(".")[1] in ("vision_tower", "multi_modal_projector") for row in sound["unexercised"])
    for rank in (0, 1):
        edit_rank(folder, rank, lambda tensors: tensors[name].zero_())
    result = two_ranks.run(validation_cases.validate, folder, None)[0]
    assert result["forward"]["max_abs_diff"] < 1e-4
    assert not result["ok"]
    assert [(row["name"], row["rank"]) for row in result["content"]["mismatches"]] == [(name, 0), (name, 1)]


def test_a_model_without_a_head_is_judged_by_its_last_hidden_state(
    two_ranks: RankPool, headless_hub: Path, tmp_path: Path
) -> None:
    execute_reshard(plan_reshard(headless_hub, Mesh(tp=2)), tmp_path / "ranks")
    for reference in (headless_hub, None):
        result = two_ranks.run(validation_cases.validate, tmp_path / "ranks", reference)[0]
        assert result["ok"], result
        assert result["forward"]["compared"] == "last_hidden_state"
        assert result["forward"]["max_abs_reference"] > 0.1


def test_a_reference_with_another_output_is_refused(
    two_ranks: RankPool, hub_folder: HubFolder, headless_hub: Path, tmp_path: Path
) -> None:
    execute_reshard(plan_reshard(headless_hub, Mesh(tp=2)), tmp_path / "ranks")
    with pytest.raises(UsageError, match=r"its logits have the shape .*, but the folder's last_hidden_state have "):
        two_ranks.run(validation_cases.validate, tmp_path / "ranks", hub_folder("llama"))


def test_a_forward_that_fails_under_its_plan_says_nothing_of_the_checkpoint(
    two_ranks: RankPool, rank_folder: RankFolder
) -> None:
    result = two_ranks.run(validation_cases.with_style, "failing", "moe_tp_experts", rank_folder("qwen3_moe", 2))
    assert result[0] == result[1]
    assert not result[0]["ok"]
    assert result[0]["structure"]["mismatches"] == result[0]["content"]["mismatches"] == []
    assert result[0]["content"]["checked"] > 20
    assert result[0]["failed"]["forward"] == "rank 0: IndexError: no such expert"
    assert result[0]["forward"] == {"ok": None, "checked": 0, "mismatches": []}


def test_too_little_memory_is_no_finding(two_ranks: RankPool, rank_folder: RankFolder) -> None:
    folder = rank_folder("qwen3_moe", 2)
    found = two_ranks.run(validation_cases.with_style, "without memory for gradients", "moe_tp_experts", folder)[0]
    assert found["verdict"] == "not fully proven"
    assert [row["name"] for row in found["unexercised"]] == ["backward"]
    assert found["skipped"].keys() == {"backward"}
    assert found["skipped"]["backward"].startswith(
        "rank 0 ran out of memory for gradients: OutOfMemoryError: CUDA out of"
    )
    assert found["generation"]["ok"]
    with pytest.raises(
        UsageError, match=r"(?s)rank 0 ran out of memory for the model: OutOfMemoryError.*hint: use more ranks"
    ):
        two_ranks.run(validation_cases.with_style, "without memory", "moe_tp_experts", folder)


def test_a_reference_of_zeros_compares_nothing(two_ranks: RankPool, rank_folder: RankFolder, tmp_path: Path) -> None:
    folder = copied(rank_folder("olmoe", 2), tmp_path)
    for rank in (0, 1):
        edit_rank(folder, rank, lambda tensors: tensors["model.norm.weight"].zero_())
    forward = two_ranks.run(validation_cases.validate, folder, None)[0]["forward"]
    assert not forward["ok"]
    assert forward["reason"] == "the reference's output is all zero; nothing was compared"


def test_not_a_number_is_a_mismatch(
    two_ranks: RankPool, hub_folder: HubFolder, rank_folder: RankFolder, tmp_path: Path
) -> None:
    folder = copied(rank_folder("olmoe", 2), tmp_path)
    edit_rank(folder, 1, lambda tensors: tensors["model.norm.weight"].fill_(float("nan")))
    result = two_ranks.run(validation_cases.validate, folder, hub_folder("olmoe"))[0]
    assert not result["ok"]
    assert not result["forward"]["ok"]
    assert result["forward"]["max_abs_diff"] is None
    assert result["forward"]["max_abs_reference"] > 0


def test_a_style_that_silently_replicates_fails_the_structure(two_ranks: RankPool, rank_folder: RankFolder) -> None:
    folder = rank_folder("qwen3_moe", 2)
    result = two_ranks.run(validation_cases.with_style, "silent", "moe_tp_down_rowwise", folder)[0]
    assert not result["ok"]
    assert result["forward"] == {"ok": None, "checked": 0, "mismatches": []}
    assert result["skipped"].keys() == {"content", "forward", "backward", "generation"}
    found = {(row["name"], row["expected"], row["found"], row["rank"]) for row in result["structure"]["mismatches"]}
    assert found == {
        (
            f"model.layers.{layer}.mlp.experts.down_proj",
            "tp: Shard(2), local shape [8, 32, 8]",
            "whole, local shape [8, 32, 16]",
            rank,
        )
        for layer in (0, 2)
        for rank in (0, 1)
    }


def test_a_plan_entry_removed_from_the_manifest_is_found(
    two_ranks: RankPool, rank_folder: RankFolder, tmp_path: Path
) -> None:
    folder = copied(rank_folder("mixtral", 2), tmp_path)
    manifest = json.loads((folder / "migrator.json").read_text())
    del manifest["plan"]["model.layers.*.mlp.experts.down_proj"]
    (folder / "migrator.json").write_text(json.dumps(manifest))
    result = two_ranks.run(validation_cases.validate, folder, None)[0]
    assert result["structure"]["mismatches"] == [
        {
            "name": "plan['model.layers.*.mlp.experts.down_proj']",
            "expected": "moe_tp_down_rowwise",
            "found": "nothing",
            "rank": None,
        }
    ]


def test_a_manifest_from_another_model_is_found(two_ranks: RankPool, rank_folder: RankFolder, tmp_path: Path) -> None:
    folder = copied(rank_folder("mixtral", 2), tmp_path)
    shutil.copy(rank_folder("olmoe", 2) / "config.json", folder)
    result = two_ranks.run(validation_cases.validate, folder, None)[0]
    assert not result["ok"]
    names = {row["name"] for row in result["structure"]["mismatches"]}
    assert {"model_type", "model.layers.0.self_attn.q_norm.weight", "model.layers.0.mlp.experts.gate_up_proj"} <= names


def test_a_model_whose_inputs_are_not_known_is_refused(
    two_ranks: RankPool, rank_folder: RankFolder, tmp_path: Path
) -> None:
    folder = copied(rank_folder("llama", 2), tmp_path)
    transformers.ResNetConfig(architectures=["ResNetModel"]).save_pretrained(folder)
    with pytest.raises(UsageError, match="ResNetModel: its config has no `image_size` to make images of"):
        two_ranks.run(validation_cases.validate, folder, None)


def test_a_kernel_that_the_config_names_is_not_run(
    two_ranks: RankPool, rank_folder: RankFolder, tmp_path: Path
) -> None:
    folder = copied(rank_folder("llama", 2), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attn_implementation": "someone/kernel"}))
    assert two_ranks.run(validation_cases.validate, folder, None)[0]["ok"]


def test_another_mesh_than_the_folders_is_refused(two_ranks: RankPool, rank_folder: RankFolder) -> None:
    with pytest.raises(UsageError, match=r"was written for `tp=4`, not `tp=2`"):
        two_ranks.run(validation_cases.validate, rank_folder("llama", 4), None)


def test_a_reference_without_weights_is_refused(
    two_ranks: RankPool, hub_folder: HubFolder, rank_folder: RankFolder, tmp_path: Path
) -> None:
    reference = copied(hub_folder("mixtral"), tmp_path)
    for file in reference.glob("*.safetensors*"):
        file.unlink()
    with pytest.raises(IncompleteError, match=r"no model\.safetensors or model\.safetensors\.index\.json, only"):
        two_ranks.run(validation_cases.validate, rank_folder("mixtral", 2), reference)


def test_a_reference_with_a_parameter_missing_is_refused(
    two_ranks: RankPool, hub_folder: HubFolder, rank_folder: RankFolder, tmp_path: Path
) -> None:
    reference = copied(hub_folder("mixtral"), tmp_path)
    index = json.loads((reference / "model.safetensors.index.json").read_text())
    path = reference / index["weight_map"]["model.norm.weight"]
    tensors = load_file(path)
    del tensors["model.norm.weight"]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(IncompleteError, match=r"tensor 'model\.norm\.weight' is not in model-"):
        two_ranks.run(validation_cases.validate, rank_folder("mixtral", 2), reference)


def test_a_reference_of_another_model_type_is_refused(
    two_ranks: RankPool, hub_folder: HubFolder, rank_folder: RankFolder
) -> None:
    with pytest.raises(
        UsageError,
        match=r"(?s)the reference's model type is llama, but that of .* is mixtral.*"
        "hint: pass the checkpoint that the folder was resharded from as the reference, or none",
    ):
        two_ranks.run(validation_cases.validate, rank_folder("mixtral", 2), hub_folder("llama"))


def test_a_reference_with_another_vocabulary_is_refused(
    two_ranks: RankPool, hub_folder: HubFolder, rank_folder: RankFolder, tmp_path: Path
) -> None:
    reference = copied(hub_folder("mixtral"), tmp_path)
    config = json.loads((reference / "config.json").read_text())
    (reference / "config.json").write_text(json.dumps(config | {"vocab_size": 50}))
    with pytest.raises(
        UsageError,
        match=r"(?s)the reference's vocabulary is 50, but that of .* is 101.*"
        "hint: pass the checkpoint that the folder was resharded from as the reference, or none",
    ):
        two_ranks.run(validation_cases.validate, rank_folder("mixtral", 2), reference)


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_on_one_rank_reaches_all(rank: int, two_ranks: RankPool) -> None:
    first, second = two_ranks.run(rank_cases.refused_together, rank)
    assert first == second
    assert first == {
        "rank": rank,
        "kind": "MigratorError",
        "message": f"rank {rank} has no disk",
        "hint": "give it one",
    }


@pytest.fixture(scope="module")
def headless_hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("headless") / "hub"
    torch.manual_seed(0)
    transformers.LlamaModel(transformers.LlamaConfig(**MODELS["llama"][1])).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llava_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rank files of a model whose vision tower is whole on every rank and does not run on tokens alone."""
    folder = tmp_path_factory.mktemp("llava")
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    text = transformers.LlamaConfig(**MODELS["llama"][1])
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=100)
    torch.manual_seed(0)
    transformers.LlavaForConditionalGeneration(config).save_pretrained(folder / "hub")
    execute_reshard(plan_reshard(folder / "hub", Mesh(tp=2)), folder / "ranks")
    return folder / "ranks"


def copied(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target / folder.name))


def edit_rank(folder: Path, rank: int, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = folder / f"rank-{rank:05d}-of-00002.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, {"format": "pt"})
