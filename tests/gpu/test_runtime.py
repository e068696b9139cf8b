"""Loading, digests and parity where ranks compute on GPUs of their own."""

from __future__ import annotations

from pathlib import Path

import pytest

from plans.mesh import Mesh, Mode
from runtime.checkpoint.resharding.execute import execute_reshard
from runtime.checkpoint.resharding.output_files import ReshardTarget
from runtime.checkpoint.resharding.plan import plan_reshard
from tests.conftest import HubFolder
from tests.gpu import gpu_cases
from tests.runtime.rank_pool import RankPool

TP, EP = Mesh(tp=2), Mesh(tp=2, ep=2)
MODES: list[tuple[Mode, Mesh]] = [
    ("tp", TP),
    ("ep", EP),
    ("tp_ep", EP),
    ("sp", TP),
    ("sp_ep", EP),
    ("tp", Mesh(fsdp=2)),
]
MODELS = ["qwen3_moe", "deepseek_v3", "glm4_moe"]


@pytest.mark.parametrize(("mode", "mesh"), MODES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_are_those_of_the_unsharded_model(
    name: str, mode: Mode, mesh: Mesh, gpu_ranks: RankPool
) -> None:
    for found in gpu_ranks.run(gpu_cases.errors, name, mode, mesh):
        assert found["logits"] < 1e-5
        assert max(found.values()) < 1e-5, max(found, key=found.__getitem__)


@pytest.mark.parametrize(("mode", "mesh"), MODES, ids=str)
def test_ranks_hold_what_slicing_gives(
    mode: Mode, mesh: Mesh, gpu_ranks: RankPool, hub_folder: HubFolder, tmp_path: Path
) -> None:
    hub = hub_folder("qwen3_moe")
    targets = {
        "ranks": ReshardTarget("ranks", mesh, mode),
        "dcp": ReshardTarget("dcp", mesh, mode),
        "four": ReshardTarget("ranks", Mesh(tp=4)),
    }
    for name, target in targets.items():
        execute_reshard(plan_reshard(hub, target=target), tmp_path / name)
    folders = [hub, *(tmp_path / name for name in targets)]
    assert gpu_ranks.run(gpu_cases.loads_what_slicing_gives, hub, folders, mode, mesh) == [[], []]


def test_digests_are_those_of_the_bytes(gpu_ranks: RankPool) -> None:
    assert gpu_ranks.run(gpu_cases.digests_differ, [0, 1, 7, 8, 4096, 16384, 2**20 + 13, 2**26 + 5]) == [[], []]
