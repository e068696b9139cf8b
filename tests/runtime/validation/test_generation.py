"""Greedy text of a parallel model, written with a key-value cache, is the unsharded model's."""

from __future__ import annotations

import pytest

from plans.errors import IndivisibleError
from plans.mesh import Mesh, Mode
from tests.runtime.parallel import parity_cases
from tests.runtime.rank_pool import RankPool

MODES: tuple[tuple[Mode, Mesh], ...] = (
    ("tp", Mesh(tp=2)),
    ("ep", Mesh(tp=2, ep=2)),
    ("tp_ep", Mesh(tp=2, ep=2)),
    ("tp", Mesh(tp=2, fsdp=2)),
    ("tp_ep", Mesh(tp=2, ep=4, fsdp=2)),
)


@pytest.mark.parametrize(("mode", "mesh"), MODES, ids=str)
@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "laguna"])
def test_sixteen_greedy_tokens_are_the_same(name: str, mode: Mode, mesh: Mesh, request: pytest.FixtureRequest) -> None:
    pool: RankPool = request.getfixturevalue({2: "two_ranks", 4: "four_ranks"}[mesh.world_size])
    for found, wanted in pool.run(parity_cases.generated, name, mode, mesh):
        assert [len(text) for text in found] == [16, 16]
        assert found == wanted
        assert len({*found[0], *found[1]}) > 3


def test_a_prompt_that_does_not_divide_cannot_be_written_on_in_sequence_parallel(two_ranks: RankPool) -> None:
    with pytest.raises(IndivisibleError, match="tp=2 does not divide the sequence length, 5"):
        two_ranks.run(parity_cases.generated, "qwen3_moe", "sp", Mesh(tp=2))
