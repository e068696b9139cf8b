"""Folders of Trainer, accelerate and axolotl: weights in a subfolder, the config in the folder above or elsewhere."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from migrator.cli import group
from plans.errors import CheckpointError, IncompleteError, MigratorError
from plans.mesh import Mesh
from runtime.checkpoint.external.source import SeparateConfig
from runtime.checkpoint.open import open_checkpoint
from runtime.checkpoint.resharding.execute import execute_reshard
from runtime.checkpoint.resharding.output_files import ReshardTarget
from runtime.checkpoint.resharding.plan import plan_reshard
from runtime.checkpoint.verifying.verify import verify
from runtime.find_config import find_config
from runtime.inspecting.inspection import inspect_checkpoint
from tests.conftest import HubFolder
from tests.runtime.checkpoint.fsdp import trainer_jobs
from tests.runtime.checkpoint.fsdp.test_fsdp import expect_equal
from tests.runtime.rank_pool import RankPool


@pytest.fixture(scope="module")
def saved(two_ranks: RankPool, hub_folder: HubFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the output folder of a job, with a checkpoint and the config that the job saved at its end."""
    output = tmp_path_factory.mktemp("trainer") / "output"
    folder = output / "checkpoint-500"
    two_ranks.run(trainer_jobs.save_checkpoint, hub_folder("qwen2"), folder, "SHARDED_STATE_DICT")
    (folder / "trainer_state.json").write_text("{}")
    torch.save({"python": 1}, folder / "rng_state_0.pth")
    torch.save({"lr": 1}, folder / "scheduler.pt")
    shutil.copy(hub_folder("qwen2") / "config.json", output)
    return output


@pytest.fixture
def job(saved: Path, tmp_path: Path) -> Path:
    """Return a copy of the job's checkpoint."""
    return Path(shutil.copytree(saved, tmp_path / "output")) / "checkpoint-500"


@pytest.mark.parametrize("below", ["", "pytorch_model_fsdp_0"])
def test_the_weights_are_found_with_the_config_above(
    below: str, job: Path, hub_folder: HubFolder, tmp_path: Path
) -> None:
    plan = plan_reshard(job / below, target=ReshardTarget("hf"))
    execute_reshard(plan, tmp_path / "hub")
    expect_equal(tmp_path / "hub", hub_folder("qwen2"))
    assert (tmp_path / "hub" / "config.json").read_bytes() == (job.parent / "config.json").read_bytes()
    assert verify(job / "pytorch_model_fsdp_0", hub_folder("qwen2")).ok
    assert f"config.json is that of {job.parent}" in plan.checkpoint.notes
    assert ("the weights are those of pytorch_model_fsdp_0" in plan.checkpoint.notes) == (not below)
    assert find_config(str(job / below)).model_type == "qwen2"


def test_the_optimizer_beside_them_goes_along(job: Path, tmp_path: Path) -> None:
    execute_reshard(plan_reshard(job, target=ReshardTarget("dcp", Mesh(tp=2))), tmp_path / "dcp")
    inspection = inspect_checkpoint(tmp_path / "dcp")
    assert inspection.optimizer is not None
    assert inspection.optimizer.tensors == 3 * inspection.tensors
    assert {left.name for left in open_checkpoint(job).read_headers().side_files.left_behind} == {
        "rng_state_0.pth", "scheduler.pt",
    }  # fmt: skip
    assert verify(job, tmp_path / "dcp").ok


def test_the_commands_say_where_they_found_it(job: Path, tmp_path: Path) -> None:
    run = CliRunner().invoke
    shown = run(group, ["inspect", str(job), "--format", "json"])
    assert json.loads(shown.stdout)["notes"] == [
        "the weights are those of pytorch_model_fsdp_0", f"config.json is that of {job.parent}",
    ]  # fmt: skip
    assert "note the weights are those of pytorch_model_fsdp_0" in run(group, ["inspect", str(job)]).stdout
    moved = run(group, ["reshard", str(job), str(tmp_path / "out")])
    assert moved.exit_code == 0
    assert "note: the weights are those of pytorch_model_fsdp_0" in moved.stderr


def test_a_config_may_be_named_for_every_layout(job: Path, hub_folder: HubFolder, tmp_path: Path) -> None:
    (job.parent / "config.json").unlink()
    with pytest.raises(IncompleteError, match=r"no config\.json"):
        plan_reshard(job)
    bare = Path(shutil.copytree(hub_folder("qwen2"), tmp_path / "hub"))
    (bare / "config.json").unlink()
    config = hub_folder("qwen2") / "config.json"
    for number, source in enumerate((job, bare)):
        arguments = ["reshard", str(source), str(tmp_path / f"out {number}"), "--config", str(config)]
        assert CliRunner().invoke(group, arguments).exit_code == 0
        assert (tmp_path / f"out {number}" / "config.json").read_bytes() == config.read_bytes()
    assert verify(bare, hub_folder("qwen2"), external=SeparateConfig.read(config.parent)).ok


def test_the_named_config_is_preferred(hub_folder: HubFolder, tmp_path: Path) -> None:
    """And it must be that of the weights: its shapes are compared like any other's."""
    plan = plan_reshard(hub_folder("qwen2"), external=SeparateConfig.read(hub_folder("qwen2")))
    assert plan.checkpoint.extra_files.keys() == {"config.json"}
    with pytest.raises(MigratorError):
        plan_reshard(hub_folder("qwen2"), external=SeparateConfig.read(hub_folder("qwen3_moe")))


def write_second_model(folder: Path) -> None:
    shutil.copytree(folder / "pytorch_model_fsdp_0", folder / "pytorch_model_fsdp_1")


def cut_a_file(folder: Path) -> None:
    path = folder / "pytorch_model_fsdp_0" / "__1_0.distcp"
    path.write_bytes(path.read_bytes()[:-100])


DAMAGE: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "two models": (write_second_model, "distributed checkpoints in subfolders", "name the one that you want, such as"),
    "a lost file": (lambda folder: (folder / "pytorch_model_fsdp_0/__1_0.distcp").unlink(), "missing", "copy the"),
    "a cut file": (cut_a_file, "truncated", "copy or save the file again"),
    "no metadata": (
        lambda folder: (folder / "pytorch_model_fsdp_0/.metadata").unlink(),
        r"only '__0_0\.distcp'|only 'optimizer_0'|contains ",
        "name",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_what_is_wrong_with_the_folder_is_one_clear_error(case: str, job: Path, tmp_path: Path) -> None:
    change, words, hint = DAMAGE[case]
    change(job)
    with pytest.raises(CheckpointError, match=words) as caught:
        plan_reshard(job)
    assert caught.value.hint.startswith(hint)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["output"]
