"""What inspecting finds in real checkpoints, held against their files and against what is known of their models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from plans.errors import IncompleteError, UsageError
from plans.mesh import Mesh
from runtime.checkpoint.resharding.execute import execute_reshard
from runtime.checkpoint.resharding.output_files import ReshardTarget
from runtime.checkpoint.resharding.plan import plan_reshard
from runtime.inspecting.inspection import inspect_checkpoint
from tests.runtime.checkpoint.optimizer.test_optimizer import with_state

TP_EP = ReshardTarget("dcp", Mesh(tp=2, ep=4, fsdp=2), "tp_ep")


def stored_bytes(folder: Path, pattern: str) -> list[int]:
    """Return the bytes of the tensors in each file."""
    totals = []
    for path in sorted(folder.glob(pattern)):
        with safe_open(path, "pt") as file:
            totals.append(sum(file.get_tensor(name).nbytes for name in file.keys()))  # noqa: SIM118
    return totals


def dcp(hub, tmp_path, target=TP_EP):
    execute_reshard(plan_reshard(hub, target=target), tmp_path / "dcp")
    return tmp_path / "dcp"


def test_hub_form_has_tensors_by_their_names_in_the_model(hub_folder):
    hub = hub_folder("qwen3_moe")
    found = inspect_checkpoint(hub)
    experts = next(group for group in found.groups if group.name.endswith("experts.gate_up_proj"))
    assert (found.layout, found.model_type, found.current, found.planned) == ("hf", "qwen3_moe", None, None)
    assert experts.names == tuple(f"model.layers.{layer}.mlp.experts.gate_up_proj" for layer in (0, 2))
    assert (experts.dtype, experts.shape, experts.bytes) == ("F32", (8, 32, 32), 2 * 8 * 32 * 32 * 4)
    assert found.bytes == sum(file.bytes for file in found.files) == sum(stored_bytes(hub, "*.safetensors"))
    assert set(found.side_files) == {"config.json", "generation_config.json"}
    assert found.hub_file_count == len(found.files) == 4


def test_rank_files_hold_the_bytes_that_are_said(rank_folder):
    folder = rank_folder("qwen3_moe", 4)
    found = inspect_checkpoint(folder)
    assert found.current is not None
    assert found.current.mesh == Mesh(tp=4)
    assert list(found.current.rank_bytes) == stored_bytes(folder, "rank-*.safetensors")
    assert len(found.digests) == found.tensors
    assert "migrator" in found.written_by


def test_rank_files_need_no_config(rank_folder, tmp_path):
    folder = Path(shutil.copytree(rank_folder("qwen3_moe", 2), tmp_path / "out"))
    (folder / "config.json").unlink()
    assert inspect_checkpoint(folder).model_type == "qwen3_moe"
    with pytest.raises(IncompleteError, match=r"config\.json"):
        inspect_checkpoint(folder, Mesh(tp=2))


def test_a_distributed_checkpoint_says_its_mesh_and_mode(hub_folder, tmp_path):
    hub = hub_folder("qwen3_moe")
    found = inspect_checkpoint(dcp(hub, tmp_path))
    execute_reshard(plan_reshard(hub, target=ReshardTarget("ranks", TP_EP.mesh, "tp_ep")), tmp_path / "ranks")
    assert found.current is not None
    assert (found.layout, found.current.mode, found.current.mesh) == ("dcp", "tp_ep", TP_EP.mesh)
    assert list(found.current.rank_bytes) == stored_bytes(tmp_path / "ranks", "rank-*.safetensors")
    without = found.folder
    (without / "migrator.json").unlink()
    assert inspect_checkpoint(without).current is None


def test_a_plan_for_another_mesh_is_what_reshard_would_make(rank_folder, tmp_path):
    folder = rank_folder("qwen3_moe", 2)
    found = inspect_checkpoint(folder, Mesh(tp=2, ep=2), "tp_ep")
    execute_reshard(plan_reshard(folder, target=ReshardTarget("ranks", Mesh(tp=2, ep=2), "tp_ep")), tmp_path / "out")
    made = inspect_checkpoint(tmp_path / "out")
    assert made.current is not None
    assert found.planned is not None
    assert found.planned.rank_bytes == made.current.rank_bytes
    assert [(g.name, g.planned.placements) for g in found.groups if g.planned] == [
        (g.name, g.current.placements) for g in made.groups if g.current
    ]


def test_tied_and_carried_tensors_are_told(hub_folder, tmp_path):
    hub = Path(shutil.copytree(hub_folder("llama"), tmp_path / "hub"))
    path = sorted(hub.glob("*.safetensors"))[0]
    index = hub / "model.safetensors.index.json"
    save_file({**load_file(path), "mtp.weight": torch.ones(3, 5)}, path, {"format": "pt"})
    listing = json.loads(index.read_text())
    listing["weight_map"]["mtp.weight"] = path.name
    index.write_text(json.dumps(listing))
    execute_reshard(plan_reshard(hub, Mesh(tp=2)), tmp_path / "ranks")
    for folder in (hub, tmp_path / "ranks"):
        found = inspect_checkpoint(folder)
        assert found.tied == {"lm_head.weight": "model.embed_tokens.weight"}
        assert found.passthrough == ("mtp.weight",)
    assert found.current is not None
    assert list(found.current.rank_bytes) == stored_bytes(tmp_path / "ranks", "rank-*.safetensors")


def test_a_lossy_checkpoint_is_named_tensor_by_tensor(hub_folder, tmp_path):
    folder = dcp(hub_folder("qwen3_moe"), tmp_path)
    gone = sorted(folder.glob("shard-*.safetensors"))[-1]
    with safe_open(gone, "pt") as file:
        names = set(file.keys())
    gone.unlink()
    found = inspect_checkpoint(folder)
    lossy = {finding.name for finding in found.findings if finding.aspect == "lossy"}
    assert lossy
    assert lossy <= names
    assert all("elements are stored" in finding.found for finding in found.findings)
    assert found.to_json()["ok"] is False


def test_files_of_two_checkpoints_are_a_finding(rank_folder, tmp_path):
    folder = Path(shutil.copytree(rank_folder("qwen3_moe", 2), tmp_path / "out"))
    shutil.copy(rank_folder("mixtral", 2) / "rank-00001-of-00002.safetensors", folder)
    (finding,) = inspect_checkpoint(folder).findings
    assert (finding.aspect, "rank-00001-of-00002" in finding.found) == ("files", True)


def test_a_config_of_another_model_is_refused_where_a_plan_is_asked_for(rank_folder, tmp_path):
    folder = Path(shutil.copytree(rank_folder("qwen3_moe", 2), tmp_path / "out"))
    shutil.copy(rank_folder("mixtral", 2) / "config.json", folder)
    with pytest.raises(IncompleteError, match=r"the model's .* are not stored"):
        inspect_checkpoint(folder, Mesh(tp=2))


def test_an_optimizer_beside_the_model_is_told_of(hub_folder, tmp_path):
    hub = with_state(Path(shutil.copytree(hub_folder("qwen3_moe"), tmp_path / "hub")), torch.optim.AdamW)
    execute_reshard(plan_reshard(hub, Mesh(tp=2)), tmp_path / "ranks")
    at_hub, at_ranks = inspect_checkpoint(hub), inspect_checkpoint(tmp_path / "ranks")
    assert at_hub.optimizer is not None
    assert at_hub.optimizer.stateless == ()
    # Two moments of each parameter, and a step count in float32.
    assert at_hub.optimizer.bytes == 2 * at_hub.bytes + 4 * at_hub.tensors
    assert at_ranks.optimizer == at_hub.optimizer
    assert (at_hub.tensors, at_ranks.tensors) == (36, 36)


def test_a_mesh_beyond_all_reason_is_refused_at_once(hub_folder, tmp_path):
    folder = dcp(hub_folder("qwen3_moe"), tmp_path)
    manifest = json.loads((folder / "migrator.json").read_text())
    manifest["mesh"] |= {"tp": 1, "ep": 1, "fsdp": 2**20}
    (folder / "migrator.json").write_text(json.dumps(manifest))
    with pytest.raises(UsageError, match="too large"):
        inspect_checkpoint(folder)


def test_the_json_form_is_json(rank_folder):
    found = inspect_checkpoint(rank_folder("qwen3_moe", 2), Mesh(tp=2))
    said = json.loads(json.dumps(found.to_json()))
    assert said["held"] == said["planned"]
    assert said["tensors"] == sum(group["tensors"] for group in said["groups"])
