"""The order of ranks against the device meshes that the installed transformers builds for the same sizes."""

from __future__ import annotations

import pytest
import torch
from transformers.distributed import DistributedConfig

from plans.mesh import Mesh
from tests.runtime.conftest import fake_rank

MESHES = [
    Mesh(tp=2, fsdp=3),
    Mesh(tp=2, fsdp=2, replicate=2),
    Mesh(tp=2, ep=4, fsdp=4, replicate=2),
    Mesh(tp=1, ep=3, fsdp=6, replicate=2),
    Mesh(tp=2, pp=3),
]


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_each_rank_is_where_the_release_puts_it(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    utils = pytest.importorskip("transformers.distributed.utils")
    if not hasattr(utils, "TransformersDeviceMesh"):
        pytest.skip("this release of transformers has no mesh for experts")
    monkeypatch.setattr(torch._C, "_get_accelerator", lambda: torch.device("cpu"))
    config = DistributedConfig(
        tp_size=mesh.tp, ep_size=mesh.ep, fsdp_size=mesh.fsdp, dp_replicate_size=mesh.replicate, pp_size=mesh.pp
    )
    for rank in range(mesh.world_size):
        with fake_rank(rank, mesh.world_size):
            theirs = utils.initialize_distributed_mesh(config)[1]
            found = {name: theirs.get_mesh(name).get_local_rank() for name in ("fsdp", "tp", "efsdp", "ep")}
            replica, stage = (theirs.get_mesh(name).get_local_rank() for name in ("dp_replicate", "pp"))
        fsdp, tp = mesh.coordinates("dense", rank)
        efsdp, ep = mesh.coordinates("experts", rank)
        assert found == {"fsdp": fsdp, "tp": tp, "efsdp": efsdp, "ep": ep}
        assert (replica, stage) == (mesh.find_replica(rank), mesh.find_stage(rank))


def test_the_release_refuses_stages_beside_data_parallelism_too() -> None:
    for sizes in ({"fsdp_size": 2}, {"dp_replicate_size": 2}):
        with pytest.raises(ValueError, match="Combining FSDP with pipeline parallelism is not supported"):
            DistributedConfig(pp_size=2, **sizes)
    dispatched = DistributedConfig(pp_size=2, tp_size=2, ep_size=2)
    with pytest.raises(ValueError, match="Combining token dispatch with pipeline parallelism is not supported"):
        dispatched._validate_resolved_ep_plan({"model.layers.*.mlp.experts": "ep_dispatch_experts"})
