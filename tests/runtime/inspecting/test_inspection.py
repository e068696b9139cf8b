"""Inspection of real checkpoints, compared with their files and with known facts of their models."""

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


def test_hub_form_is_reported_by_parameter_names(hub_folder):
    hub = hub_folder("qwen3_moe")
    inspection = inspect_checkpoint(hub)
    experts = next(group for group in inspection.groups if group.name.endswith("experts.gate_up_proj"))
    assert (inspection.layout, inspection.model_type, inspection.current, inspection.planned) == (
        "hf",
        "qwen3_moe",
        None,
        None,
    )
    assert experts.names == tuple(f"model.layers.{layer}.mlp.experts.gate_up_proj" for layer in (0, 2))
    assert (experts.dtype, experts.shape, experts.bytes) == ("F32", (8, 32, 32), 2 * 8 * 32 * 32 * 4)
    assert inspection.bytes == sum(file.bytes for file in inspection.files) == sum(stored_bytes(hub, "*.safetensors"))
    assert set(inspection.side_files) == {"config.json", "generation_config.json"}
    assert inspection.hub_file_count == len(inspection.files) == 4


def test_reported_bytes_are_those_of_the_rank_files(rank_folder):
    folder = rank_folder("qwen3_moe", 4)
    inspection = inspect_checkpoint(folder)
    assert inspection.current is not None
    assert inspection.current.mesh == Mesh(tp=4)
    assert list(inspection.current.rank_bytes) == stored_bytes(folder, "rank-*.safetensors")
    assert len(inspection.digests) == inspection.tensors
    assert "migrator" in inspection.written_by


def test_rank_files_need_no_config(rank_folder, tmp_path):
    folder = Path(shutil.copytree(rank_folder("qwen3_moe", 2), tmp_path / "out"))
    (folder / "config.json").unlink()
    assert inspect_checkpoint(folder).model_type == "qwen3_moe"
    with pytest.raises(IncompleteError, match=r"config\.json"):
        inspect_checkpoint(folder, Mesh(tp=2))


def test_a_distributed_checkpoint_records_its_mesh_and_mode(hub_folder, tmp_path):
    hub = hub_folder("qwen3_moe")
    inspection = inspect_checkpoint(dcp(hub, tmp_path))
    execute_reshard(plan_reshard(hub, target=ReshardTarget("ranks", TP_EP.mesh, "tp_ep")), tmp_path / "ranks")
    assert inspection.current is not None
    assert (inspection.layout, inspection.current.mode, inspection.current.mesh) == ("dcp", "tp_ep", TP_EP.mesh)
    assert list(inspection.current.rank_bytes) == stored_bytes(tmp_path / "ranks", "rank-*.safetensors")
    without = inspection.folder
    (without / "migrator.json").unlink()
    assert inspect_checkpoint(without).current is None


def test_the_plan_for_another_mesh_is_what_reshard_writes(rank_folder, tmp_path):
    folder = rank_folder("qwen3_moe", 2)
    inspection = inspect_checkpoint(folder, Mesh(tp=2, ep=2), "tp_ep")
    execute_reshard(plan_reshard(folder, target=ReshardTarget("ranks", Mesh(tp=2, ep=2), "tp_ep")), tmp_path / "out")
    written = inspect_checkpoint(tmp_path / "out")
    assert written.current is not None
    assert inspection.planned is not None
    assert inspection.planned.rank_bytes == written.current.rank_bytes
    assert [(g.name, g.planned.placements) for g in inspection.groups if g.planned] == [
        (g.name, g.current.placements) for g in written.groups if g.current
    ]


def test_tied_and_passthrough_tensors_are_reported(hub_folder, tmp_path):
    hub = Path(shutil.copytree(hub_folder("llama"), tmp_path / "hub"))
    path = sorted(hub.glob("*.safetensors"))[0]
    index = hub / "model.safetensors.index.json"
    save_file({**load_file(path), "mtp.weight": torch.ones(3, 5)}, path, {"format": "pt"})
    listing = json.loads(index.read_text())
    listing["weight_map"]["mtp.weight"] = path.name
    index.write_text(json.dumps(listing))
    execute_reshard(plan_reshard(hub, Mesh(tp=2)), tmp_path / "ranks")
    for folder in (hub, tmp_path / "ranks"):
        inspection = inspect_checkpoint(folder)
        assert inspection.tied == {"lm_head.weight": "model.embed_tokens.weight"}
        assert inspection.passthrough == ("mtp.weight",)
    assert inspection.current is not None
    assert list(inspection.current.rank_bytes) == stored_bytes(tmp_path / "ranks", "rank-*.safetensors")


def test_a_lossy_checkpoint_is_reported_tensor_by_tensor(hub_folder, tmp_path):
    folder = dcp(hub_folder("qwen3_moe"), tmp_path)
    deleted = sorted(folder.glob("shard-*.safetensors"))[-1]
    with safe_open(deleted, "pt") as file:
        names = set(file.keys())
    deleted.unlink()
    inspection = inspect_checkpoint(folder)
    lossy = {finding.name for finding in inspection.findings if finding.aspect == "lossy"}
    assert lossy
    assert lossy <= names
    assert all("elements are stored" in finding.found for finding in inspection.findings)
    assert inspection.to_json()["ok"] is False


def test_files_of_two_checkpoints_are_a_finding(rank_folder, tmp_path):
    folder = Path(shutil.copytree(rank_folder("qwen3_moe", 2), tmp_path / "out"))
    shutil.copy(rank_folder("mixtral", 2) / "rank-00001-of-00002.safetensors", folder)
    (finding,) = inspect_checkpoint(folder).findings
    assert (finding.aspect, "rank-00001-of-00002" in finding.found) == ("files", True)


def test_a_config_of_another_model_is_refused_if_a_plan_is_requested(rank_folder, tmp_path):
    folder = Path(shutil.copytree(rank_folder("qwen3_moe", 2), tmp_path / "out"))
    shutil.copy(rank_folder("mixtral", 2) / "config.json", folder)
    with pytest.raises(IncompleteError, match=r"the model's .* are not stored"):
        inspect_checkpoint(folder, Mesh(tp=2))


def test_optimizer_state_is_reported(hub_folder, tmp_path):
    hub = with_state(Path(shutil.copytree(hub_folder("qwen3_moe"), tmp_path / "hub")), torch.optim.AdamW)
    execute_reshard(plan_reshard(hub, Mesh(tp=2)), tmp_path / "ranks")
    at_hub, at_ranks = inspect_checkpoint(hub), inspect_checkpoint(tmp_path / "ranks")
    assert at_hub.optimizer is not None
    assert at_hub.optimizer.stateless == ()
    # Two moments of each parameter, and a step count in float32.
    assert at_hub.optimizer.bytes == 2 * at_hub.bytes + 4 * at_hub.tensors
    assert at_ranks.optimizer == at_hub.optimizer
    assert (at_hub.tensors, at_ranks.tensors) == (36, 36)


def test_an_absurdly_large_mesh_is_refused_at_once(hub_folder, tmp_path):
    folder = dcp(hub_folder("qwen3_moe"), tmp_path)
    manifest = json.loads((folder / "migrator.json").read_text())
    manifest["mesh"] |= {"tp": 1, "ep": 1, "fsdp": 2**20}
    (folder / "migrator.json").write_text(json.dumps(manifest))
    with pytest.raises(UsageError, match="a mesh of 1,048,576 ranks is too large to inspect"):
        inspect_checkpoint(folder)


def test_the_json_form_is_json(rank_folder):
    inspection = inspect_checkpoint(rank_folder("qwen3_moe", 2), Mesh(tp=2))
    data = json.loads(json.dumps(inspection.to_json()))
    assert data["held"] == data["planned"]
    assert data["tensors"] == sum(group["tensors"] for group in data["groups"])
