"""`migrator inspect` as a user runs it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from plans.mesh import Mesh
from runtime.checkpoint.resharding.execute import execute_reshard
from runtime.checkpoint.resharding.output_files import ReshardTarget
from runtime.checkpoint.resharding.plan import plan_reshard
from tests.hub_server import serving
from tests.waiting import HANG_TIMEOUT


def row(output, name):
    (found,) = [line for line in output.splitlines() if line.strip().startswith(name)]
    return " ".join(found.split())


def test_hub_form_is_shown_without_a_mesh(migrator, hub_folder):
    hub = hub_folder("qwen3_moe")
    code, output, errors = migrator("inspect", hub)
    assert (code, errors) == (0, [])
    assert output.splitlines()[0] == f"{hub}: hf, qwen3_moe"
    assert row(output, "model.layers.*.mlp.experts.gate_up_proj") == (
        "model.layers.*.mlp.experts.gate_up_proj ×2 F32 8 × 32 × 32 64 KiB"
    )
    assert "36 tensors, 196,416 bytes, in 4 weight files" in output
    assert "side files: config.json, generation_config.json" in output
    assert "digests: none recorded" in output


def test_rank_files_are_shown_with_their_mesh_and_another(migrator, rank_folder):
    folder = rank_folder("qwen3_moe", 2)
    code, output, _ = migrator("inspect", folder, "--tp", 2, "--ep", 2)
    assert code == 0
    title = "ranks, qwen3_moe, tp=2, ep=1, fsdp=1, mode tp; planned for tp=2, ep=2, fsdp=1, mode tp_ep"
    assert output.splitlines()[0] == f"{folder}: {title}"
    experts = row(output, "model.layers.*.mlp.experts.gate_up_proj")
    assert experts.endswith("tp: Packed(1, 2) ep: Shard(0) 64 KiB 32 KiB")
    assert row(output, "model.norm.weight").endswith("replicated replicated 128 B 128 B")
    assert "each rank would hold" in output
    assert "hub form: known, 4 files, so the way back to it is exact" in output
    assert "digests: 36 recorded, which `migrator verify` checks" in output


def test_only_json_is_printed(migrator, rank_folder):
    code, output, errors = migrator("inspect", rank_folder("qwen3_moe", 2), "--format", "json")
    inspection = json.loads(output)
    assert (code, errors) == (0, [])
    assert (inspection["ok"], inspection["layout"], inspection["planned"], inspection["held"]["mode"]) == (
        True,
        "ranks",
        None,
        "tp",
    )
    assert len(inspection["held"]["bytes_per_rank"]) == 2
    groups = {group["name"]: group for group in inspection["groups"]}
    experts = groups["model.layers.*.mlp.experts.gate_up_proj"]["held"]
    assert experts["placements"] == [{"replicate": True}, {"packed": [1, 2]}]
    assert experts["bytes_per_rank"] == {"least": 16384, "most": 16384}
    assert len(inspection["digests"]) == inspection["tensors"] == 36


def test_a_report_is_written_besides_the_output(migrator, rank_folder, tmp_path):
    file = tmp_path / "report.html"
    code, output, errors = migrator("inspect", rank_folder("qwen3_moe", 2), "--report", file, "--format", "json")
    assert (code, errors) == (0, [f"wrote {file}"])
    assert json.loads(output)["ok"]
    assert file.read_text("utf-8").startswith("<!DOCTYPE html>")


def test_a_report_that_cannot_be_written_is_one_clear_error(migrator, rank_folder, tmp_path):
    code, _, errors = migrator("inspect", rank_folder("qwen3_moe", 2), "--report", tmp_path / "none" / "report.html")
    assert code == 2
    assert [line.split(":")[0] for line in errors] == ["error", "hint"]


def test_lossy_tensors_are_named_one_by_one(migrator, hub_folder, tmp_path):
    execute_reshard(plan_reshard(hub_folder("qwen3_moe"), target=ReshardTarget("dcp", Mesh(tp=2))), tmp_path / "dcp")
    sorted((tmp_path / "dcp").glob("shard-*.safetensors"))[-1].unlink()
    code, output, errors = migrator("inspect", tmp_path / "dcp", "--report", tmp_path / "report.html")
    assert (code, errors) == (1, [f"wrote {tmp_path / 'report.html'}"])
    *wrong, last = output.splitlines()
    assert len(wrong) > 1
    assert all(line.startswith("WRONG  ") and ": lossy, only " in line for line in wrong)
    assert last.endswith(f"{len(wrong)} findings")
    inspection = json.loads(migrator("inspect", tmp_path / "dcp", "--format", "json")[1])
    assert (inspection["ok"], len(inspection["findings"])) == (False, len(wrong))
    page = (tmp_path / "report.html").read_text("utf-8")
    assert all(finding["name"] in page for finding in inspection["findings"])


def no_folder(folder):
    shutil.rmtree(folder)


def no_file(folder):
    sorted(folder.glob("rank-*"))[0].unlink()


def a_cut_file(folder):
    path = sorted(folder.glob("rank-*"))[0]
    path.write_bytes(path.read_bytes()[:-10])


def a_lying_manifest(folder):
    (folder / "migrator.json").write_text("{")


@pytest.mark.parametrize("damage", [no_folder, no_file, a_cut_file, a_lying_manifest])
def test_an_unreadable_checkpoint_is_one_clear_error(migrator, rank_folder, tmp_path, damage):
    folder = Path(shutil.copytree(rank_folder("qwen3_moe", 2), tmp_path / "out"))
    damage(folder)
    code, output, errors = migrator("inspect", folder)
    assert (code, output) == (2, "")
    assert [line.split(":")[0] for line in errors] == ["error", "hint"]


def test_a_mesh_that_the_plan_refuses_is_one_clear_error(migrator, rank_folder):
    code, output, errors = migrator("inspect", rank_folder("qwen3_moe", 2), "--tp", 3)
    assert (code, output) == (2, "")
    assert [line.split(":")[0] for line in errors] == ["error", "hint"]


def test_a_checkpoint_on_the_hub_is_inspected(hub_folder, tmp_path):
    with serving() as hub:
        hub.add("owner/toy", hub_folder("qwen3_moe"))
        settings = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": ""}
        program = str(Path(sys.executable).with_name("migrator"))
        command = [program, "inspect", "hf://owner/toy", "--format", "json"]
        done = subprocess.run(
            command, env={**os.environ, **settings}, capture_output=True, check=False, timeout=HANG_TIMEOUT
        )
    assert (done.returncode, done.stderr) == (0, b"")
    assert json.loads(done.stdout)["tensors"] == 36


def test_hostile_names_are_escaped_and_shortened(migrator, hub_folder, tmp_path):
    hub = Path(shutil.copytree(hub_folder("qwen3_moe"), tmp_path / "hub"))
    names = ("\x1b[2Jgone", "<script>alert(1)</script>", "[bold]x[/bold]", "long" * 2500)
    path = sorted(hub.glob("*.safetensors"))[0]
    save_file({**load_file(path), **{name: torch.ones(2) for name in names}}, path, {"format": "pt"})
    index = json.loads((hub / "model.safetensors.index.json").read_text())
    index["weight_map"] |= dict.fromkeys(names, path.name)
    (hub / "model.safetensors.index.json").write_text(json.dumps(index))
    code, output, _ = migrator("inspect", hub, "--report", tmp_path / "report.html")
    assert code == 0
    assert "\x1b" not in output
    assert "\\x1b[2Jgone" in output
    assert "[bold]x[/bold]" in output
    assert max(map(len, output.splitlines())) < 1000
    page = (tmp_path / "report.html").read_text("utf-8")
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    inspection = json.loads(migrator("inspect", hub, "--format", "json")[1])
    assert set(inspection["carried"]) == set(names)


def test_many_tensors_take_bounded_space_and_time(migrator, hub_folder, tmp_path):
    hub = Path(shutil.copytree(hub_folder("qwen3_moe"), tmp_path / "hub"))
    many = {f"extra.tensor_{number}": torch.ones(1) for number in range(50_000)}
    save_file({**joined(hub), **many}, hub / "model.safetensors", {"format": "pt"})
    code, output, _ = migrator("inspect", hub, "--report", tmp_path / "report.html", "--tp", 2)
    assert code == 0
    assert len(output.splitlines()) < 250
    assert "more groups, which --format json lists" in output
    assert (tmp_path / "report.html").stat().st_size < 1_000_000


def joined(hub):
    return {name: tensor for path in sorted(hub.glob("model-*")) for name, tensor in load_file(path).items()}
