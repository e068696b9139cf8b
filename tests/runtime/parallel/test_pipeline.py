"""Pipeline stages: transformers' own loading as oracle of which parameter is where, and forwards over all stages."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from plans.mesh import Mesh
from runtime.checkpoint.files.safetensors import read_header
from runtime.checkpoint.ranks.files import rank_file_name
from runtime.checkpoint.resharding.execute import execute_reshard
from runtime.checkpoint.resharding.output_files import ReshardTarget
from runtime.checkpoint.resharding.plan import plan_reshard
from runtime.checkpoint.verifying.verify import verify
from tests.runtime.parallel import pipeline_cases
from tests.runtime.rank_pool import RankPool
from tests.runtime.thread_pool import ThreadPool

HubFolder = Callable[[str], Path]

STAGES = Mesh(tp=2, pp=2)
NORM = "model.layers.2.input_layernorm.weight"


def reshard(source: Path, target: ReshardTarget, folder: Path) -> Path:
    execute_reshard(plan_reshard(source, target=target), folder)
    return folder


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "llama"])  # Llama's embedding is tied
def test_each_stage_holds_what_transformers_loads_there(
    name: str, two_ranks: RankPool, hub_folder: HubFolder, tmp_path: Path
) -> None:
    hub, mesh = hub_folder(name), Mesh(pp=2)
    ranks = reshard(hub, ReshardTarget(mesh=mesh), tmp_path / "ranks")
    expected = two_ranks.run(pipeline_cases.loaded_by_the_release, hub)
    for folder in (hub, ranks):
        for (held, logits), (ours, found) in zip(
            expected, two_ranks.run(pipeline_cases.loaded, folder, mesh), strict=True
        ):
            assert ours == held
            assert torch.allclose(found, logits, rtol=1e-5, atol=1e-5 * float(logits.abs().max()))
    for rank, (held, _) in enumerate(expected):
        tied = {"lm_head.weight"} if name == "llama" else set()
        assert read_header(ranks / rank_file_name(rank, 2)).tensors.keys() == held.keys() - tied


@pytest.mark.full
def test_transformers_itself_loads_no_stages_of_tensor_parallel_ranks(
    four_ranks: RankPool, hub_folder: HubFolder
) -> None:
    """5.23 and 5.24 look for the modules of a plan that they resolved before they took layers out."""
    with pytest.raises(AssertionError, match=r"KeyError: 'model.layers.\d.self_attn.q_proj.weight'"):
        four_ranks.run(pipeline_cases.loaded_by_the_release, hub_folder("qwen2"), 2)


@pytest.mark.parametrize("layout", ["ranks", "dcp", "hf"])
def test_stages_of_tensor_parallel_ranks_compute_the_same(layout: str, hub_folder: HubFolder, tmp_path: Path) -> None:
    hub = hub_folder("qwen3_moe")
    target = ReshardTarget("hf") if layout == "hf" else ReshardTarget(layout, STAGES)  # type: ignore[arg-type]
    folder = reshard(hub, target, tmp_path / layout)
    assert max(ThreadPool(4).run(pipeline_cases.logits_error, hub, folder, STAGES)) < 1e-5


def test_rank_files_for_other_stages_are_read_in_slices(hub_folder: HubFolder, tmp_path: Path) -> None:
    folder = reshard(hub_folder("qwen2"), ReshardTarget(mesh=Mesh(tp=2, pp=3)), tmp_path / "ranks")
    assert max(ThreadPool(4).run(pipeline_cases.logits_error, hub_folder("qwen2"), folder, STAGES)) < 1e-5
    whole = reshard(hub_folder("qwen2"), ReshardTarget(mesh=Mesh(tp=2)), tmp_path / "whole")
    assert max(ThreadPool(4).run(pipeline_cases.logits_error, hub_folder("qwen2"), whole, STAGES)) < 1e-5


def test_what_a_stage_cannot_do_is_refused(hub_folder: HubFolder) -> None:
    for loss, state in ThreadPool(2).run(pipeline_cases.refusals, hub_folder("qwen2"), Mesh(pp=2)):
        assert "computes no loss, because nothing is sent backward across stages" in loss
        assert "hint: leave `labels` out, or parallelize without `pp` to train" in loss
        assert "has no whole state on any rank" in state
        assert "hint: reshard the checkpoint that it was loaded from" in state


def test_pipeline_stages_change_neither_hub_form_nor_dcp(hub_folder: HubFolder, tmp_path: Path) -> None:
    hub = hub_folder("llama")
    plain, staged = (reshard(hub, ReshardTarget("dcp", mesh), tmp_path / str(mesh.pp)) for mesh in (Mesh(tp=2), STAGES))
    one, other = ({file.name: file.read_bytes() for file in folder.glob("*.safetensors")} for folder in (plain, staged))
    assert one == other
    back = reshard(staged, ReshardTarget("hf"), tmp_path / "back")
    assert {file.name: file.read_bytes() for file in back.iterdir()} == {
        file.name: file.read_bytes() for file in hub.iterdir()
    }


def test_damage_in_one_stage_is_named_with_its_stage(hub_folder: HubFolder, tmp_path: Path) -> None:
    folder = reshard(hub_folder("qwen2"), ReshardTarget(mesh=STAGES), tmp_path / "ranks")
    assert verify(folder).ok
    damaged = Path(shutil.copytree(folder, tmp_path / "damaged"))
    file = damaged / rank_file_name(3, 4)
    content, stored = bytearray(file.read_bytes()), read_header(file).tensors[NORM]
    content[stored.offset] ^= 1
    file.write_bytes(content)
    (found,) = verify(damaged).differences
    assert (found.name, "rank 3, stage 1, of " in str(found)) == (NORM, True), str(found)
    (against,) = verify(damaged, hub_folder("qwen2")).differences
    assert (against.name, "rank 3, stage 1, of " in str(against)) == (NORM, True), str(against)
    for message in ThreadPool(4).run(pipeline_cases.damaged, damaged, STAGES):
        assert f"the content of {NORM!r} is not what was recorded" in message
