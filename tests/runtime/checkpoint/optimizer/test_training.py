"""Training goes on over another mesh as if it had never stopped: transformers saves, we reshard, transformers loads."""

from __future__ import annotations

from pathlib import Path

import pytest

from plans.mesh import Mesh
from runtime.checkpoint.resharding.execute import execute_reshard
from runtime.checkpoint.resharding.output_files import ReshardTarget
from runtime.checkpoint.resharding.plan import plan_reshard
from tests.conftest import HubFolder
from tests.runtime.checkpoint.optimizer import optimizer_cases
from tests.runtime.checkpoint.optimizer.test_optimizer import assert_equal, values_of
from tests.runtime.installed_torch import saves_distributed
from tests.runtime.rank_pool import RankPool

STEPS, STOP = range(6), 3

MESHES = {
    "tp2": Mesh(tp=2),
    "fsdp2": Mesh(fsdp=2),
    "tp4": Mesh(tp=4),
    "fsdp4": Mesh(fsdp=4),
    "tp2 fsdp2": Mesh(tp=2, fsdp=2),
    "tp2 ep2": Mesh(tp=2, ep=2),
    "tp2 ep2 fsdp2": Mesh(tp=2, ep=2, fsdp=2),
}
WAYS = [("tp2", "tp2 fsdp2")]
MORE = [
    ("tp2", "fsdp2"),
    ("fsdp2", "tp2"),
    ("tp2 fsdp2", "tp2"),
    ("tp2 fsdp2", "fsdp2"),
    ("tp2 fsdp2", "tp4"),
    ("tp4", "tp2 fsdp2"),
    ("fsdp4", "tp2"),
    ("fsdp2", "fsdp4"),
    ("tp2", "tp2 ep2"),
    ("tp2 ep2", "tp2 fsdp2"),
    ("tp2 ep2 fsdp2", "fsdp2"),
    ("tp2", "tp2 ep2 fsdp2"),
]


def sizes(mesh: Mesh) -> dict[str, int]:
    """Return what transformers calls the mesh's axes, those of size one left out."""
    named = {"tp_size": mesh.tp, "fsdp_size": mesh.fsdp, "ep_size": mesh.ep}
    return {name: size for name, size in named.items() if size > 1}


def target(mesh: Mesh) -> ReshardTarget:
    return ReshardTarget("dcp", mesh, "tp_ep" if mesh.ep > 1 else "tp")


def far(losses: list[float], expected: list[float]) -> float:
    """Return the largest relative distance of losses from others."""
    return max(abs(found / wanted - 1) for found, wanted in zip(losses, expected, strict=True))


@saves_distributed
@pytest.mark.parametrize(("one", "other"), [*WAYS, *(pytest.param(*way, marks=pytest.mark.full) for way in MORE)])
def test_training_goes_on_as_if_it_had_never_stopped(
    one: str, other: str, hub_folder: HubFolder, two_ranks: RankPool, four_ranks: RankPool, tmp_path: Path
) -> None:
    pools = {2: two_ranks, 4: four_ranks}

    def trained(folder: Path, mesh: str, steps: range, load_from: Path | None = None, save_to: Path | None = None):
        arguments = (folder, sizes(MESHES[mesh]), steps, load_from, save_to)
        losses, *others = pools[MESHES[mesh].world_size].run(optimizer_cases.train, *arguments)
        assert all(far(row, losses) == 0 for row in others)
        return losses

    hub, first, second = hub_folder("qwen3_moe"), tmp_path / "first", tmp_path / "second"
    uninterrupted = trained(hub, one, STEPS)
    assert trained(hub, one, STEPS[:STOP], save_to=first) == uninterrupted[:STOP]
    execute_reshard(plan_reshard(first, target=target(MESHES[other])), second)
    assert far(trained(second, other, STEPS[STOP:], load_from=second), uninterrupted[STOP:]) < 1e-6
    # Without the state the losses differ, so that it is what makes them equal.
    assert far(trained(second, other, STEPS[STOP:]), uninterrupted[STOP:]) > 1e-3
    execute_reshard(plan_reshard(second, target=target(MESHES[one])), tmp_path / "back")
    assert_equal(values_of(tmp_path / "back"), values_of(first))
    assert_equal(values_of(second), values_of(first))
