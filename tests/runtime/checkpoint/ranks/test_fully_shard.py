"""FSDP over tensor parallelism: forms against live `fully_shard` on real ranks, uneven and empty pieces included."""

from __future__ import annotations

import pytest

from tests.runtime.checkpoint.ranks import fully_shard_cases
from tests.runtime.rank_pool import RankPool
from tests.runtime.thread_pool import ThreadPool


@pytest.mark.parametrize("sizes", [(2, 2), (4, 1)])
@pytest.mark.parametrize("seed", range(2))
def test_local_elements_equal_those_of_fully_shard(four_ranks: RankPool, sizes: tuple[int, int], seed: int) -> None:
    for found in four_ranks.run(fully_shard_cases.differences, seed, 250, sizes):
        assert not found, found[:5]


@pytest.mark.parametrize(("replicate", "sizes"), [(2, (2, 1)), (2, (1, 2)), (2, (2, 2)), (4, (2, 1))])
def test_local_elements_of_replicas_equal_those_of_fully_shard(replicate: int, sizes: tuple[int, int]) -> None:
    ranks = ThreadPool(replicate * sizes[0] * sizes[1])
    for found in ranks.run(fully_shard_cases.differences, 0, 60, sizes, replicate):
        assert not found, found[:5]
