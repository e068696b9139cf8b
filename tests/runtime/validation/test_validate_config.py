"""Validation without a reference of folders whose config.json was changed, and of models that fail unsharded."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from plans.errors import CheckpointError, UsageError
from plans.mesh import Mesh
from runtime.checkpoint.resharding.execute import execute_reshard
from runtime.checkpoint.resharding.output_files import ReshardTarget
from runtime.checkpoint.resharding.plan import plan_reshard
from tests.conftest import HubFolder, RankFolder
from tests.runtime.rank_pool import RankPool
from tests.runtime.validation import validation_cases

ROPE = {"rope_type": "default", "rope_theta": 500.0}
LAYERS = ["full_attention"] * 3
CASES: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    "qwen3_moe": (
        "ranks",
        {"rms_norm_eps": 0.01, "hidden_act": "gelu", "num_experts_per_tok": 3, "rope_parameters": ROPE},
        {"rms_norm_eps", "hidden_act", "num_experts_per_tok", "rope_parameters.rope_theta"},
    ),
    "mellum": ("ranks", {"layer_types": LAYERS}, {"layer_types"}),
    "deepseek_v3": ("dcp", {"routed_scaling_factor": 1.0}, {"routed_scaling_factor"}),
}


def edit(folder: Path, **entries: object) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))
    return folder


@pytest.mark.parametrize("name", CASES)
def test_a_config_that_was_changed_after_the_layout(
    name: str, two_ranks: RankPool, rank_folder: RankFolder, hub_folder: HubFolder, tmp_path: Path
) -> None:
    layout, entries, keys = CASES[name]
    if layout == "dcp":
        execute_reshard(plan_reshard(hub_folder(name), target=ReshardTarget("dcp", Mesh(tp=2))), tmp_path / "out")
    else:
        shutil.copytree(rank_folder(name, 2), tmp_path / "out")
    found = two_ranks.run(validation_cases.validate, edit(tmp_path / "out", **entries))[0]
    assert {part for part in validation_cases.PARTS if found[part]["mismatches"]} == {"structure"}
    assert {row["name"] for row in found["structure"]["mismatches"]} == {f"config.json: {key}" for key in keys}
    assert all(row["expected"].endswith(", as when it was written") for row in found["structure"]["mismatches"])
    assert not found["ok"]


def test_a_model_that_fails_unsharded_has_no_wrong_plan(
    two_ranks: RankPool, hub_folder: HubFolder, tmp_path: Path
) -> None:
    hub = edit(Path(shutil.copytree(hub_folder("mixtral"), tmp_path / "hub")), num_experts_per_tok=5)
    with pytest.raises(UsageError, match=r"the unsharded model cannot run on these inputs: .*selected index k out of"):
        two_ranks.run(validation_cases.validate, hub)


def test_a_model_without_gradients_has_no_wrong_plan(two_ranks: RankPool, hub_folder: HubFolder) -> None:
    found = two_ranks.run(validation_cases.without_gradients, hub_folder("qwen2"))[0]
    assert found["verdict"] == "not fully proven"
    assert [row["name"] for row in found["unexercised"]] == ["backward"]
    assert found["backward"]["mismatches"] == []
    assert found["skipped"]["backward"] == "the unsharded model cannot compute gradients: RuntimeError: no derivative"


@pytest.mark.parametrize("which", ["source", "reference"])
def test_settings_of_generation_that_are_a_pipe_are_refused(
    which: str, two_ranks: RankPool, hub_folder: HubFolder, tmp_path: Path
) -> None:
    hub = hub_folder("qwen2")
    piped = Path(shutil.copytree(hub, tmp_path / "hub"))
    (piped / "generation_config.json").unlink()
    os.mkfifo(piped / "generation_config.json")
    folders = (piped, None) if which == "source" else (hub, piped)
    with pytest.raises(CheckpointError, match=r"generation_config\.json: not a regular file"):
        two_ranks.run(validation_cases.validate, *folders)
