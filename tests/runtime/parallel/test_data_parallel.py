"""Data parallel ranks with batches of their own: gradients are the average over all of them, whatever the backend."""

from __future__ import annotations

import pytest

from plans.mesh import Mesh, Mode
from tests.runtime.parallel import parity_cases
from tests.runtime.rank_pool import RankPool
from tests.runtime.thread_pool import ThreadPool


@pytest.mark.parametrize(("mode", "mesh"), [("tp", Mesh(tp=2, fsdp=2)), ("tp_ep", Mesh(tp=2, ep=2, fsdp=2))], ids=str)
def test_gradients_are_the_average_of_the_batches(mode: Mode, mesh: Mesh, four_ranks: RankPool) -> None:
    for found in four_ranks.run(parity_cases.own_batches, "qwen3_moe", mode, mesh):
        assert found.logits < 1e-5
        assert found.worst[1] < 1e-5, found.worst


def test_gloo_is_asked_for_sums_only(four_ranks: RankPool) -> None:
    """In torch 2.8 its reduce-scatter gives the sum where it is asked for the average, and says nothing."""
    for asked in four_ranks.run(parity_cases.asked_reductions, "qwen3_moe", Mesh(tp=2, fsdp=2)):
        assert asked == ["RedOpType.SUM"]


@pytest.mark.parametrize(
    ("mode", "mesh"),
    [
        ("tp", Mesh(tp=2, replicate=2)),
        ("tp", Mesh(tp=2, fsdp=2, replicate=2)),
        ("tp_ep", Mesh(tp=2, ep=2, fsdp=2, replicate=2)),
    ],
    ids=str,
)
def test_gradients_are_the_average_over_replicas_too(mode: Mode, mesh: Mesh) -> None:
    for found in ThreadPool(mesh.world_size).run(parity_cases.own_batches, "qwen3_moe", mode, mesh):
        assert found.logits < 1e-5
        assert found.worst[1] < 1e-5, found.worst
