"""Damage that structure, content, forward or backward must find, each the right one and by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from plans.errors import CheckpointError, IndivisibleError, UsageError
from plans.mesh import Mesh
from runtime.checkpoint.resharding.execute import execute_reshard
from runtime.checkpoint.resharding.output_files import ReshardTarget
from runtime.checkpoint.resharding.plan import plan_reshard
from runtime.validation.inputs import sample_batches
from runtime.validation.outputs import generate_tokens
from runtime.validation.request import ValidationRequest
from tests.runtime.rank_pool import RankPool
from tests.runtime.thread_pool import ThreadPool
from tests.runtime.validation import validation_cases
from tests.tiny_models import DENSE, tiny_config, tiny_model

HubFolder = Callable[[str], Path]
RankFolder = Callable[[str, int], Path]

EXPERTS = "model.layers.0.mlp.experts"
Ranks = RankPool | ThreadPool


# On threads, warnings of transformers reach the test.
pytestmark = pytest.mark.filterwarnings("ignore:.*the plan cuts:UserWarning")


@pytest.fixture(params=["processes", pytest.param("threads", marks=pytest.mark.full)])
def ranks(request: pytest.FixtureRequest) -> Ranks:
    """Two ranks; whatever they are, they find the same damage."""
    found: Ranks = ThreadPool(2) if request.param == "threads" else request.getfixturevalue("two_ranks")
    return found


def test_a_rank_file_of_another_run(
    ranks: Ranks, rank_folder: RankFolder, hub_folder: HubFolder, tmp_path: Path
) -> None:
    folder = copied(rank_folder("olmoe", 2), tmp_path)
    tiny_model(tiny_config("olmoe"), seed=99).save_pretrained(tmp_path / "other")
    execute_reshard(plan_reshard(tmp_path / "other", Mesh(tp=2)), tmp_path / "other-ranks")
    shutil.copy(tmp_path / "other-ranks" / "rank-00001-of-00002.safetensors", folder)
    found = ranks.run(validation_cases.validate, folder, hub_folder("olmoe"))[0]
    assert found["structure"]["ok"]
    named = {(row["name"], row["rank"]) for row in found["content"]["mismatches"]}
    # What ranks hold whole is wrong on the one rank; what they share is wrong together.
    assert ("model.norm.weight", 1) in named
    assert ("model.norm.weight", 0) not in named
    assert (f"{EXPERTS}.gate_up_proj", None) in named
    assert len(named) == found["content"]["checked"]
    assert {row["name"] for row in found["forward"]["mismatches"]} == {"logits", "logits in F32"}
    assert not found["ok"]


def test_a_whole_checkpoint_of_another_run_shows_in_content_and_forward(
    ranks: Ranks, hub_folder: HubFolder, tmp_path: Path
) -> None:
    tiny_model(tiny_config("olmoe"), seed=99).save_pretrained(tmp_path / "other")
    execute_reshard(plan_reshard(tmp_path / "other", Mesh(tp=2)), tmp_path / "ranks")
    found = ranks.run(validation_cases.validate, tmp_path / "ranks", hub_folder("olmoe"))[0]
    assert wrong_parts(found) == {"content", "forward", "backward", "generation"}
    assert found["content"]["with_reference"]["different"] == len(found["content"]["mismatches"])


@pytest.mark.parametrize("layout", ["hf", "ranks"])
@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_a_row_that_no_token_reaches_is_held_against_the_reference(
    value: float, layout: Any, ranks: Ranks, hub_folder: HubFolder, tmp_path: Path
) -> None:
    reference = hub_folder("qwen2")
    folder = copied(reference, tmp_path)
    name = "model.embed_tokens.weight"
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        if name in tensors:
            tensors[name][unread(reference)] = value
            save_file(tensors, path, {"format": "pt"})
    if layout == "ranks":
        execute_reshard(plan_reshard(folder, Mesh(tp=2)), tmp_path / "ranks")
        folder = tmp_path / "ranks"
    found = ranks.run(validation_cases.validate, folder, reference)[0]
    assert wrong_parts(found) == {"content"}
    [wrong] = found["content"]["mismatches"]
    assert (wrong["name"], wrong["expected"].endswith("as in the reference")) == (name, True)


@pytest.mark.parametrize(
    ("entries", "key"),
    [
        ({"rms_norm_eps": 1.1e-6}, "rms_norm_eps"),
        ({"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 0}, "sliding_window"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "rope_parameters.rope_type"),
        ({"attention_dropout": 0.5}, "attention_dropout"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_config_that_few_tokens_do_not_tell_from_the_references(
    entries: dict[str, Any],
    key: str,
    ranks: Ranks,
    rank_folder: RankFolder,
    hub_folder: HubFolder,
    tmp_path: Path,
) -> None:
    folder = copied(rank_folder("qwen2", 2), tmp_path)
    edit_json(folder / "config.json", **entries)
    found = ranks.run(validation_cases.validate, folder, hub_folder("qwen2"))[0]
    # An epsilon shows in float64, and only there; the others change nothing that so few tokens reach.
    seen = {"forward", "backward"} if key == "rms_norm_eps" else set()
    assert wrong_parts(found) == {"structure", *seen}
    assert f"config.json: {key}" in {row["name"] for row in found["structure"]["mismatches"]}
    assert found["forward"]["max_abs_diff"] < 1e-5 * found["forward"]["max_abs_reference"]


def test_a_config_that_says_the_same_in_other_words(
    ranks: Ranks, rank_folder: RankFolder, hub_folder: HubFolder, tmp_path: Path
) -> None:
    folder = copied(rank_folder("qwen2", 2), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    del config["attention_dropout"], config["rms_norm_eps"]  # which are as the class has them
    said = {"use_cache": False, "eos_token_id": 3, "transformers_version": "4.0.0", "of_another_tool": {"any": 1}}
    (folder / "config.json").write_text(json.dumps(config | said))
    assert ranks.run(validation_cases.validate, folder, hub_folder("qwen2"))[0]["ok"]


def test_a_reference_with_fewer_layers_is_refused(
    ranks: Ranks, rank_folder: RankFolder, hub_folder: HubFolder, tmp_path: Path
) -> None:
    reference = copied(hub_folder("mixtral"), tmp_path)
    edit_json(reference / "config.json", num_hidden_layers=2)
    with pytest.raises(UsageError, match=r"its tensors differ from those of .*'model\.layers\.2\."):
        ranks.run(validation_cases.validate, rank_folder("mixtral", 2), reference)


def test_a_damaged_reference_is_no_finding_of_the_checkpoint(
    ranks: Ranks, rank_folder: RankFolder, hub_folder: HubFolder, tmp_path: Path
) -> None:
    folder = rank_folder("mixtral", 2)
    contradictory = copied(folder, tmp_path)
    manifest = json.loads((contradictory / "migrator.json").read_text())
    manifest["tensors"]["model.norm.weight"]["dtype"] = "F16"
    edit_json(contradictory / "migrator.json", tensors=manifest["tensors"])
    lossy = tmp_path / "dcp"
    execute_reshard(plan_reshard(hub_folder("mixtral"), target=ReshardTarget("dcp", Mesh(tp=2))), lossy)
    (lossy / "migrator.json").unlink()
    name = f"{EXPERTS}.down_proj"
    drop(next(path for path in lossy.glob("*.safetensors") if name in load_file(path)), name)
    for reference in (contradictory, lossy):
        with pytest.raises(
            CheckpointError,
            match=r"(?s)the reference is damaged.*"
            "hint: pass the checkpoint that the folder was resharded from as the reference$",
        ):
            ranks.run(validation_cases.validate, folder, reference)


@pytest.mark.parametrize("layout", ["dcp", "ranks"])
def test_one_flipped_bit_in_any_file_is_named(layout: Any, ranks: Ranks, hub_folder: HubFolder, tmp_path: Path) -> None:
    execute_reshard(
        plan_reshard(hub_folder("olmoe"), target=ReshardTarget(layout, Mesh(tp=2, ep=2), "tp_ep")), tmp_path / "out"
    )
    path = sorted((tmp_path / "out").glob("*.safetensors"))[-1]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    found = ranks.run(validation_cases.validate, tmp_path / "out", None, Mesh(tp=2, ep=2), "tp_ep")[0]
    assert [len(found[part]["mismatches"]) for part in ("structure", "content")] == [0, 1]


@pytest.mark.parametrize("part", ["gate_up_proj", "down_proj"])
def test_experts_that_stay_whole_below_a_hook_that_sums(part: str, ranks: Ranks, rank_folder: RankFolder) -> None:
    style = {"gate_up_proj": "moe_tp_gate_up_colwise", "down_proj": "moe_tp_down_rowwise"}[part]
    found = ranks.run(validation_cases.with_style, "silent", style, rank_folder("mixtral", 2))[0]
    assert {row["name"].rpartition(".")[2] for row in found["structure"]["mismatches"]} == {part}
    assert {row["rank"] for row in found["structure"]["mismatches"]} == {0, 1}
    assert found["forward"]["ok"] is None


def test_a_plan_whose_experts_are_hooked_but_not_sharded(ranks: Ranks, rank_folder: RankFolder, tmp_path: Path) -> None:
    folder = copied(rank_folder("mixtral", 2), tmp_path)
    plan = {"layers.*.mlp.experts": "moe_tp_experts"}
    edit_json(folder / "config.json", base_model_tp_plan=plan)
    found = ranks.run(validation_cases.validate, folder)[0]
    assert wrong_parts(found) == {"structure"}
    assert "its output would be multiplied by 2" in found["structure"]["mismatches"][0]["found"]


def test_a_doubled_output_of_experts(ranks: Ranks, rank_folder: RankFolder) -> None:
    found = ranks.run(validation_cases.with_style, "doubled", "moe_tp_experts", rank_folder("mixtral", 2))[0]
    assert wrong_parts(found) >= {"forward", "backward"}
    assert found["structure"]["ok"]
    assert found["content"]["ok"]


def test_gradients_that_stay_partial_on_each_rank(ranks: Ranks, rank_folder: RankFolder) -> None:
    folder = rank_folder("qwen3_moe", 2)
    found = ranks.run(validation_cases.with_style, "unsummed", "replicated_with_grad_allreduce", folder)[0]
    assert wrong_parts(found) == {"backward"}
    rows = {(row["name"], row["rank"]) for row in found["backward"]["mismatches"]}
    assert rows == {
        (f"model.layers.{layer}.self_attn.{norm}_norm.weight", rank)
        for layer in (0, 1, 2)
        for norm in "qk"
        for rank in (0, 1)
    }


def test_a_model_that_cannot_be_continued_has_no_wrong_plan(ranks: Ranks, tmp_path: Path) -> None:
    # The first attention of a Jamba is its fifth layer, and its cache asks one for the length of the text.
    sizes = {"num_hidden_layers": 2, "num_key_value_heads": 2, "num_experts": 4, "mamba_d_state": 4}
    tiny_model(transformers.JambaConfig(**DENSE | sizes)).save_pretrained(tmp_path / "hub")
    found = ranks.run(validation_cases.validate, tmp_path / "hub")[0]
    assert wrong_parts(found) == set()
    assert found["skipped"]["generation"].startswith("the unsharded model cannot generate: ValueError")


def test_heads_of_keys_that_do_not_divide(ranks: Ranks, rank_folder: RankFolder, tmp_path: Path) -> None:
    config = tiny_config("qwen2")
    config.num_key_value_heads = 1
    tiny_model(config).save_pretrained(tmp_path / "hub")
    # A mesh that is asked for is refused, a folder that was laid out so is damaged.
    with pytest.raises(IndivisibleError, match="heads"):
        ranks.run(validation_cases.validate, tmp_path / "hub")
    folder = copied(rank_folder("qwen2", 2), tmp_path)
    edit_json(folder / "config.json", num_key_value_heads=1)
    found = ranks.run(validation_cases.validate, folder)[0]
    assert wrong_parts(found) == {"structure"}
    [row] = found["structure"]["mismatches"]
    assert (row["expected"], "heads" in row["found"]) == ("a plan that resolves on this model and mesh", True)


def test_memory_that_is_not_as_predicted(ranks: Ranks, rank_folder: RankFolder) -> None:
    found = ranks.run(validation_cases.with_wide_weights, "model.norm.weight", rank_folder("olmoe", 2))[0]
    assert [(row["name"], row["rank"]) for row in found["structure"]["mismatches"]] == [("memory", 0), ("memory", 1)]
    assert found["content"]["mismatches"] != []


def test_a_distributed_checkpoint_without_all_rows_is_lossy(
    ranks: Ranks, hub_folder: HubFolder, tmp_path: Path
) -> None:
    execute_reshard(plan_reshard(hub_folder("olmoe"), target=ReshardTarget("dcp", Mesh(tp=2))), tmp_path / "dcp")
    (tmp_path / "dcp" / "migrator.json").unlink()
    name = f"{EXPERTS}.down_proj"
    path = next(path for path in (tmp_path / "dcp").glob("*.safetensors") if name in load_file(path))
    drop(path, name)
    found = ranks.run(validation_cases.validate, tmp_path / "dcp")[0]
    assert wrong_parts(found) == {"content"}
    [row] = found["content"]["mismatches"]
    assert (row["name"], "elements are stored" in row["found"]) == (name, True)


def unread(folder: Path) -> int:
    """Return a token that models neither read nor write."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    request = ValidationRequest(folder, Mesh(tp=2))
    inputs = sample_batches(model, request)[0].inputs
    read = set(
        torch.cat([inputs["input_ids"], generate_tokens(model, inputs, request.new_tokens)], 1).flatten().tolist()
    )
    return next(token for token in range(model.config.vocab_size) if token not in read)


def wrong_parts(found: dict[str, Any]) -> set[str]:
    """Return the parts with mismatches; where there are any the whole is wrong."""
    parts = {part for part in validation_cases.PARTS if found[part]["mismatches"]}
    assert found["ok"] == (not parts)
    return parts


def drop(path: Path, name: str) -> None:
    from safetensors import safe_open

    with safe_open(path, "pt") as opened:
        metadata = opened.metadata()
    info = json.loads(metadata["DCP_SHARDING_INFO"])
    tensors = load_file(path)
    del tensors[name], info[name]
    save_file(tensors, path, metadata | {"DCP_SHARDING_INFO": json.dumps(info)})


def edit_json(path: Path, **entries: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def copied(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target / folder.name))
