"""FSDP over tensor parallelism: forms against live `fully_shard` on real ranks, uneven and empty pieces included."""

from __future__ import annotations

import pytest

from tests.runtime.checkpoint.ranks import fully_shard_cases
from tests.runtime.rank_pool import RankPool


@pytest.mark.parametrize("sizes", [(2, 2), (4, 1)])
@pytest.mark.parametrize("seed", range(2))
def test_local_elements_equal_those_of_fully_shard(four_ranks: RankPool, sizes: tuple[int, int], seed: int) -> None:
    for found in four_ranks.run(fully_shard_cases.differences, seed, 250, sizes):
        assert not found, found[:5]
