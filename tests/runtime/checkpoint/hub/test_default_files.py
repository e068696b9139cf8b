"""Hub form of a checkpoint that was never in it: the same files as `save_pretrained` writes."""

from __future__ import annotations

import filecmp
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed import checkpoint as dcp
from transformers import AutoModelForCausalLM

from runtime.checkpoint.hub import writer
from runtime.checkpoint.resharding.execute import execute_reshard
from runtime.checkpoint.resharding.output_files import ReshardTarget
from runtime.checkpoint.resharding.plan import plan_reshard
from tests.conftest import HubFolder

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.mark.parametrize("family", ["qwen3_moe", "llama"])
def test_tensors_that_fit_into_one_file_are_in_one(
    family: str, hub_folder: HubFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many experts a stack has: each counts as what it takes in a file."""
    expected, found = save_both(family, "200KB", hub_folder, tmp_path, monkeypatch)
    names = [path.name for path in expected.glob("*.safetensors*")]
    assert names == ["model.safetensors"]
    assert [path.name for path in found.glob("*.safetensors*")] == names
    assert filecmp.cmpfiles(expected, found, names, shallow=False) == (names, [], [])


@pytest.mark.parametrize("family", ["qwen3_moe", "llama"])
def test_no_file_is_larger_than_it_may_be_and_none_is_needless(
    family: str, hub_folder: HubFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, found = save_both(family, "50KB", hub_folder, tmp_path, monkeypatch)
    tensors = [load_file(path) for path in sorted(found.glob("*.safetensors"))]
    sizes = [sum(value.nbytes for value in file.values()) for file in tensors]
    assert max(sizes) <= 50_000
    assert all(first + second > 50_000 for first, second in pairwise(sizes))
    whole = {name: value for path in expected.glob("*.safetensors") for name, value in load_file(path).items()}
    merged = {name: value for file in tensors for name, value in file.items()}
    assert merged.keys() == whole.keys()
    assert all(torch.equal(merged[name], whole[name]) for name in whole)


def save_both(
    family: str, size: str, hub_folder: HubFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, Path]:
    """Save a model by `save_pretrained`, and by a reshard of what torch saved of it, files being of a size at most."""
    model = AutoModelForCausalLM.from_pretrained(hub_folder(family))
    expected, saved, found = (tmp_path / name for name in ("expected", "saved", "found"))
    model.save_pretrained(expected, max_shard_size=size)
    dcp.save(model.state_dict(), checkpoint_id=saved, no_dist=True)
    shutil.copy(expected / "config.json", saved)
    monkeypatch.setattr(writer, "_MAX_FILE_SIZE", size)
    execute_reshard(plan_reshard(saved, target=ReshardTarget("hf")), found)
    return expected, found
