"""Replicas and pipeline stages: there, proven on ranks as threads, and back to the same bytes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import transformers

from plans.errors import UsageError
from plans.mesh import Mesh
from runtime.checkpoint.files.safetensors import read_header
from runtime.checkpoint.ranks.files import rank_file_name
from runtime.checkpoint.resharding.execute import execute_reshard
from runtime.checkpoint.resharding.output_files import ReshardTarget
from runtime.checkpoint.resharding.plan import plan_reshard
from runtime.validation.request import ValidationRequest
from tests.runtime.thread_pool import ThreadPool
from tests.runtime.validation import validation_cases
from tests.tiny_models import DENSE, tiny_model

HubFolder = Callable[[str], Path]

MODELS = [
    "qwen3_moe",
    pytest.param("deepseek_v3", marks=pytest.mark.full),
    pytest.param("glm4_moe", marks=pytest.mark.full),
]
REPLICAS, STAGES = Mesh(tp=2, fsdp=2, replicate=2), Mesh(tp=2, pp=2)
NORM = "model.layers.2.input_layernorm.weight"


def there_and_back(hub: Path, mesh: Mesh, folder: Path) -> Path:
    """Reshard hub form for a mesh and back; return the folder for the mesh."""
    execute_reshard(plan_reshard(hub, mesh), folder / "ranks")
    execute_reshard(plan_reshard(folder / "ranks", target=ReshardTarget("hf")), folder / "back")
    for file in hub.iterdir():
        assert (folder / "back" / file.name).read_bytes() == file.read_bytes()
    return folder / "ranks"


@pytest.mark.full
@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "glm4_moe"])
def test_replicas_of_shards_are_proven(name: str, hub_folder: HubFolder, tmp_path: Path) -> None:
    hub = hub_folder(name)
    ranks = there_and_back(hub, REPLICAS, tmp_path)
    assert len(list(ranks.glob("rank-*"))) == 4
    found = ThreadPool(8).run(validation_cases.validate, ranks, hub, REPLICAS)[0]
    assert found["verdict"] == "proven", found
    assert found["backward"]["batches"] == 4


@pytest.mark.parametrize("name", MODELS)
def test_stages_are_proven_except_for_gradients(name: str, hub_folder: HubFolder, tmp_path: Path) -> None:
    hub = hub_folder(name)
    ranks = there_and_back(hub, STAGES, tmp_path)
    found = ThreadPool(4).run(validation_cases.validate, ranks, hub, STAGES)[0]
    reason = "no release of transformers computes gradients across pipeline stages"
    assert (found["verdict"], found["skipped"]) == ("not fully proven", {"backward": reason})
    assert [(row["name"], row["reason"]) for row in found["unexercised"]] == [("backward", reason)]
    assert all(found[part]["ok"] for part in ("structure", "content", "forward", "generation")), found
    assert (found["structure"]["stages"], found["forward"]["batches"]) == (2, 1)


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        ("llama", Mesh(pp=3)),  # tied embeddings
        pytest.param("mellum", STAGES, marks=pytest.mark.full),  # sliding and full attention
    ],
)
def test_stages_are_proven_where_gradients_are_not_asked_for(name: str, mesh: Mesh, hub_folder: HubFolder) -> None:
    ranks = ThreadPool(mesh.world_size)
    found = ranks.run(validation_cases.validate_allowing, hub_folder(name), ("backward",), mesh)[0]
    assert found["verdict"] == "proven", found


def test_damage_in_one_stage_is_named_with_its_stage(hub_folder: HubFolder, tmp_path: Path) -> None:
    ranks = there_and_back(hub_folder("qwen2"), STAGES, tmp_path)
    damaged = Path(shutil.copytree(ranks, tmp_path / "damaged"))
    for rank in (2, 3):
        file = damaged / rank_file_name(rank, 4)
        content, stored = bytearray(file.read_bytes()), read_header(file).tensors[NORM]
        content[stored.offset + 2] ^= 64
        file.write_bytes(content)
    found = ThreadPool(4).run(validation_cases.validate, damaged, hub_folder("qwen2"), STAGES)[0]
    assert found["verdict"] == "not proven"
    rows = [row for row in found["content"]["mismatches"] if row["rank"] is not None]
    assert [(row["name"], row["rank"], row["found"].endswith(" in stage 1")) for row in rows] == [
        (NORM, 2, True),
        (NORM, 3, True),
    ]


def test_stages_are_not_compared_block_by_block(tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"(?s)pp=2 stages are not compared.*hint: leave `by_block` out, or reshard without `pp`"
    ):
        ValidationRequest(tmp_path, STAGES, by_block=True)


def test_a_model_that_scales_what_each_stage_receives_is_not_proven(tmp_path: Path) -> None:
    """Granite's base multiplies any `inputs_embeds`, and hidden states arrive as such: transformers errs alike."""
    config = transformers.GraniteConfig(**DENSE, embedding_multiplier=12.0)
    tiny_model(config).save_pretrained(tmp_path / "hub")
    found = ThreadPool(2).run(validation_cases.validate, tmp_path / "hub", None, Mesh(pp=2))[0]
    assert found["verdict"] == "not proven"
    assert {part for part in validation_cases.PARTS if found[part]["mismatches"]} == {"forward", "generation"}


def test_a_loss_between_stages_shows(hub_folder: HubFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    from runtime.parallel import pipeline

    share = pipeline._share
    monkeypatch.setattr(pipeline, "_share", lambda tensor, *args: share(tensor, *args) * 1.001)
    found = ThreadPool(2).run(validation_cases.validate, hub_folder("qwen2"), None, Mesh(pp=2))[0]
    assert {part for part in validation_cases.PARTS if found[part]["mismatches"]} >= {"forward"}
