"""Rank files that real FSDP jobs pickled: read without a plan, from any mesh; contradictions are one clear error."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from plans.errors import CheckpointError, HeaderError, IncompleteError, MigratorError, MismatchError
from plans.mesh import Mesh
from runtime.checkpoint.open import open_checkpoint
from runtime.checkpoint.resharding.execute import execute_reshard
from runtime.checkpoint.resharding.output_files import ReshardTarget
from runtime.checkpoint.resharding.plan import plan_reshard
from runtime.checkpoint.verifying.verify import verify
from runtime.find_config import find_config
from runtime.inspecting.inspection import inspect_checkpoint
from tests.conftest import HubFolder
from tests.runtime.checkpoint.fsdp import fsdp_jobs
from tests.runtime.checkpoint.hub.test_pickled import load_hub
from tests.runtime.rank_pool import RankPool

Saved = Callable[[str], Path]
Q = "model.layers.0.self_attn.q_proj.weight"

JOBS: dict[str, tuple[str, dict[str, int], str]] = {
    "two ranks": ("qwen2", {"fsdp": 2}, ""),
    "with torch's getter": ("qwen3_moe", {"fsdp": 2}, "with torch's getter"),
    "as one group": ("qwen2", {"fsdp": 2}, "as one group"),
    "under a prefix": ("qwen2", {"fsdp": 2}, "with a prefix"),
    "with a compiled layer": ("qwen2", {"fsdp": 2}, "compiled"),
    "under hub names": ("qwen3_moe", {"fsdp": 2}, "under hub names"),
    "uneven and empty shards": ("olmoe", {"fsdp": 4}, ""),
    "replicas": ("qwen2", {"ddp": 2, "fsdp": 2}, ""),
    "replicas, each with a mesh of its own": ("qwen2", {"ddp": 2, "fsdp": 2}, "replicas apart"),
    "over tensor parallelism": ("qwen2", {"fsdp": 2, "tp": 2}, "over tensor parallelism"),
}


@pytest.fixture(scope="module")
def hub(hub_folder: HubFolder, checkpoint: Saved) -> Saved:
    return lambda family: hub_folder(family) if family == "qwen2" else checkpoint(family)


@pytest.fixture(scope="module")
def job(two_ranks: RankPool, four_ranks: RankPool, hub: Saved, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function from a job's name to the folder that it saved; tests that damage it copy first."""
    folders: dict[str, Path] = {}

    def saved(name: str) -> Path:
        if name not in folders:
            family, sizes, how = JOBS[name]
            folder = folders[name] = tmp_path_factory.mktemp("job") / "actor"
            (folder / "huggingface").mkdir(parents=True)
            for file in ("config.json", "generation_config.json"):
                shutil.copy(hub(family) / file, folder / "huggingface")
            (folder / "fsdp_config.json").write_text('{"FSDP_version": 2, "world_size": 2}')
            ranks = two_ranks if sizes == {"fsdp": 2} else four_ranks
            ranks.run(fsdp_jobs.save_ranks, hub(family), folder, sizes, how)
        return folders[name]

    return saved


def expect_equal(folder: Path, hub: Path) -> None:
    found, expected = load_hub(folder), load_hub(hub)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("name", JOBS)
def test_a_job_becomes_what_it_was_loaded_from(name: str, job: Saved, hub: Saved, tmp_path: Path) -> None:
    original = hub(JOBS[name][0])
    execute_reshard(plan_reshard(job(name), target=ReshardTarget("hf")), tmp_path / "hub")
    expect_equal(tmp_path / "hub", original)
    assert verify(job(name), original).ok
    written = {path.name for path in (tmp_path / "hub").iterdir() if path.suffix != ".safetensors"}
    assert written >= {"config.json", "generation_config.json", "fsdp_config.json"}
    assert "huggingface" not in written


def test_hub_names_in_safetensors_are_converted(two_ranks: RankPool, hub: Saved, tmp_path: Path) -> None:
    original = hub("mixtral")
    two_ranks.run(fsdp_jobs.save_hub_names, original, tmp_path / "saved")
    shutil.copy(original / "config.json", tmp_path / "saved")
    execute_reshard(plan_reshard(tmp_path / "saved", target=ReshardTarget("hf")), tmp_path / "hub")
    expect_equal(tmp_path / "hub", original)
    assert verify(tmp_path / "saved", original).ok


def test_names_that_only_wrappers_distinguish_are_refused(job: Saved, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(job("with a compiled layer"), tmp_path / "saved"))
    wrapped = "model.layers.1._orig_mod.mlp.up_proj.weight"
    bare = wrapped.replace("_orig_mod.", "")
    for rank in range(2):
        edit(folder, rank, lambda state: state.update({bare: state[wrapped]}))
    with pytest.raises(
        CheckpointError,
        match=r"(?s)one tensor's names without their wrappers.*hint: save the model that you want alone",
    ):
        plan_reshard(folder, target=ReshardTarget("hf"))


def test_it_goes_to_another_mesh_without_a_plan(job: Saved, hub: Saved, tmp_path: Path) -> None:
    target = ReshardTarget("ranks", Mesh(tp=2))
    execute_reshard(plan_reshard(job("replicas"), target=target), tmp_path / "ranks")
    execute_reshard(plan_reshard(hub("qwen2"), target=target), tmp_path / "expected")
    for file in (tmp_path / "expected").glob("*.safetensors"):
        assert {name: tensor.tolist() for name, tensor in load_file(tmp_path / "ranks" / file.name).items()} == {
            name: tensor.tolist() for name, tensor in load_file(file).items()
        }


def test_it_is_inspected_and_planned_for(job: Saved) -> None:
    assert inspect_checkpoint(job("replicas"), Mesh(tp=2)).layout == "fsdp"
    assert find_config(str(job("replicas"))).model_type == "qwen2"


@pytest.fixture
def damaged(job: Saved, tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: Path(shutil.copytree(job(name), tmp_path / "damaged"))


def rank_file(folder: Path, rank: int) -> Path:
    return next(folder.glob(f"model_world_size_*_rank_{rank}.pt"))


def edit(folder: Path, rank: int, change: Callable[[dict[str, Any]], object]) -> None:
    """Change what a rank saved, by torch's own hands."""
    state = torch.load(rank_file(folder, rank), weights_only=False)
    change(state)
    torch.save(state, rank_file(folder, rank))


def negate(state: dict[str, Any]) -> None:
    state[Q]._local_tensor.neg_()


def move(state: dict[str, Any]) -> None:
    """Let a rank say that it stands where the other one does."""
    mesh = state[Q]._spec.mesh
    mesh._coordinate_on_dim = type(mesh._coordinate_on_dim)([0])


def cut(state: dict[str, Any]) -> None:
    state[Q]._local_tensor = state[Q]._local_tensor[:-1].clone()


def save_schedulers(folder: Path, *steps: int) -> None:
    """Save what verl does beside the weights: a scheduler and random states; rank 0 is at step 4."""
    for rank, step in enumerate((4, *steps)):
        scheduler = torch.optim.lr_scheduler.LambdaLR(torch.optim.SGD([torch.zeros(1)]), lambda step: 1.0)
        for _ in range(step):
            scheduler.optimizer.step()
            scheduler.step()
        rng = {"cpu": torch.get_rng_state(), "numpy": np.random.get_state(), "random": random.getstate()}
        state = {"lr_scheduler": scheduler.state_dict(), "rng": rng}
        torch.save(state, folder / f"extra_state_world_size_2_rank_{rank}.pt")


def make_partial(state: dict[str, Any]) -> None:
    state[Q]._spec.placements = (torch.distributed.tensor.Partial(),)


DAMAGE: dict[str, tuple[str, Callable[[Path], object], type[MigratorError], str]] = {
    "a missing rank": (
        "two ranks", lambda folder: rank_file(folder, 1).unlink(), IncompleteError,
        r"(?s)1 of 2 ranks have no file.*hint: copy the missing files; on several machines, each"
    ),
    "another world": (
        "two ranks", lambda folder: (folder / "model_world_size_4_rank_3.pt").touch(), MismatchError,
        r"(?s)of 2 and 4 ranks.*hint: the files belong to several checkpoints; name a folder with those of one"
    ),
    "a cut file": (
        "two ranks",
        lambda folder: rank_file(folder, 1).write_bytes(rank_file(folder, 1).read_bytes()[:-900]),
        HeaderError,
        "is not a zip archive",
    ),
    "the same file twice": (
        "two ranks", lambda folder: shutil.copy(rank_file(folder, 0), rank_file(folder, 1)), MismatchError, "not hold"
    ),
    "a rank in another place": ("two ranks", lambda folder: edit(folder, 1, move), MismatchError, "not hold the"),
    "a replica of another step": (
        "replicas", lambda folder: edit(folder, 2, negate), MismatchError, "with other values"
    ),
    "ranks of different steps": (
        "two ranks", lambda folder: save_schedulers(folder, 7), MismatchError,
        r"(?s)rank 0 was saved at step 4 and rank 1 at step 7.*hint: the files belong to several checkpoints"
    ),
    "a shard that is too small": ("two ranks", lambda folder: edit(folder, 1, cut), MismatchError,
        r"(?s)its placements.*hint: the file is damaged or was saved by another mesh; copy or save it again"),
    "a tensor that a rank lacks": (
        "two ranks", lambda folder: edit(folder, 1, lambda state: state.pop(Q)), IncompleteError, "not have the same"
    ),
    "parts of a sum": (
        "two ranks", lambda folder: edit(folder, 0, make_partial), HeaderError, "not a plain tensor but made by"
    ),
    "no config": (
        "two ranks", lambda folder: (folder / "huggingface" / "config.json").unlink(), IncompleteError, "no config"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_files_that_contradict_one_another_are_one_clear_error(case: str, damaged: Any, tmp_path: Path) -> None:
    name, change, error, words = DAMAGE[case]
    folder = damaged(name)
    change(folder)
    with pytest.raises(error, match=words) as caught:
        plan_reshard(folder, target=ReshardTarget("hf"))
    assert "\n" not in caught.value.message
    assert caught.value.hint
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]


def test_ranks_of_jobs_with_different_meshes_are_refused(damaged: Any, job: Saved) -> None:
    folder = damaged("replicas")
    for rank in range(4):
        for other in set(range(4)) - {rank}:
            shutil.copy(rank_file(job("replicas"), other), folder)
        shutil.copy(rank_file(job("over tensor parallelism"), rank), folder)
        with pytest.raises(
            MismatchError,
            match=r"(?s)is split over a mesh of 2.* on rank 0 but split over.*hint: the files belong to several",
        ) as caught:
            plan_reshard(folder, target=ReshardTarget("hf"))
        assert "\n" not in caught.value.message


def split_by_three(state: dict[str, Any]) -> None:
    """Let a tensor say that FSDP split what three ranks had left of it."""
    spec = state[Q]._spec
    spec.placements = (type(spec.placements[0])(0, split_factor=3), *spec.placements[1:])


def test_a_split_that_the_mesh_does_not_explain_is_refused_and_the_whole_model_is_read(
    damaged: Any, hub: Saved, four_ranks: RankPool, tmp_path: Path
) -> None:
    family, sizes, how = JOBS["over tensor parallelism"]
    folder = damaged("over tensor parallelism")
    for rank in range(4):
        edit(folder, rank, split_by_three)
    with pytest.raises(
        CheckpointError,
        match=r"(?s)a split factor of 3, which does not follow from its mesh.*hint: save the whole model instead, such "
        "as with `get_model_state_dict` and `full_state_dict=True`",
    ):
        plan_reshard(folder, target=ReshardTarget("hf"))
    for file in folder.glob("*.pt"):
        file.unlink()
    four_ranks.run(fsdp_jobs.save_whole, hub(family), folder, sizes, how)
    shutil.copy(hub(family) / "config.json", folder)
    execute_reshard(plan_reshard(folder, target=ReshardTarget("hf")), tmp_path / "hub")
    expect_equal(tmp_path / "hub", hub(family))


def test_states_of_the_job_are_left_behind_by_name(damaged: Any) -> None:
    folder = damaged("two ranks")
    torch.save({"state": {}}, folder / "optim_world_size_2_rank_0.pt")
    save_schedulers(folder, 4)
    left = {left.name: left.reason for left in open_checkpoint(folder).read_headers().side_files.left_behind}
    assert set(left.values()) == {"the state of an optimizer, a scheduler or a sampler"}
    assert len(left) == 3
    (folder / "extra_state_world_size_2_rank_1.pt").write_bytes(b"damaged, but not read")
    assert open_checkpoint(folder).read_headers().tensors
