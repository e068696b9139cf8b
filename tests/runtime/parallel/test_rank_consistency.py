"""Ranks with other weights, plans or batches than rank 0's: refused on every rank alike, and named."""

from __future__ import annotations

import pytest

from plans.mesh import Mesh
from tests.runtime.parallel import rank_consistency_cases as same_on_ranks_cases
from tests.runtime.rank_pool import RankPool

MESHES = (Mesh(tp=4), Mesh(tp=2, fsdp=2), Mesh(tp=1, fsdp=4), Mesh(tp=2, ep=4, fsdp=2))


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_another_seed_on_one_rank(mesh: Mesh, rank: int, four_ranks: RankPool) -> None:
    wanted = "UsageError: model.embed_tokens.weight is not the same on all ranks: it differs from rank 0's on rank "
    assert four_ranks.run(same_on_ranks_cases.with_other_seed, rank, mesh) == [f"{wanted}{rank} of the mesh"] * 4


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_the_same_seed_is_accepted(mesh: Mesh, four_ranks: RankPool) -> None:
    assert four_ranks.run(same_on_ranks_cases.with_other_seed, None, mesh) == ["accepted"] * 4


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.2.mlp.experts.down_proj", "lm_head.weight"])
def test_one_parameter_is_named(name: str, two_ranks: RankPool) -> None:
    for found in two_ranks.run(same_on_ranks_cases.with_one_other_value, 1, name):
        assert found.startswith(f"UsageError: {name} is not the same on all ranks")


def test_a_model_on_meta_on_one_rank_only(two_ranks: RankPool) -> None:
    for found in two_ranks.run(same_on_ranks_cases.with_one_on_meta):
        assert found.startswith("UsageError: model.embed_tokens.weight is not the same on all ranks")


def test_another_plan_on_one_rank(two_ranks: RankPool) -> None:
    for found in two_ranks.run(same_on_ranks_cases.with_another_plan):
        assert found.startswith("UsageError: the plan is not the same on all ranks")


@pytest.mark.parametrize("rank", [0, 1])
def test_what_one_rank_refuses_all_refuse(rank: int, two_ranks: RankPool) -> None:
    for found in two_ranks.run(same_on_ranks_cases.with_unknown_style_on, rank):
        assert found.startswith("UnknownStyleError: 'lm_head'")


EQUAL = [(2, 16)] * 4


@pytest.mark.parametrize(
    ("mesh", "sizes", "seeds", "refusing"),
    [
        (Mesh(tp=4), EQUAL, [1, 1, 1, 1], []),
        (Mesh(tp=4), EQUAL, [1, 1, 2, 1], [0, 1, 2, 3]),
        (Mesh(tp=4), [(2, 16), (2, 16), (2, 17), (2, 16)], [1, 1, 1, 1], [0, 1, 2, 3]),
        (Mesh(tp=2, fsdp=2), EQUAL, [1, 1, 2, 2], []),
        (Mesh(tp=2, fsdp=2), EQUAL, [1, 1, 2, 3], [2, 3]),
        (Mesh(tp=2, ep=4, fsdp=2), EQUAL, [1, 1, 2, 2], [0, 1, 2, 3]),
        (Mesh(tp=1, fsdp=4), EQUAL, [1, 2, 3, 4], []),
    ],
    ids=str,
)
def test_batches_are_compared_where_ranks_compute_together(
    mesh: Mesh, sizes: list[tuple[int, int]], seeds: list[int], refusing: list[int], four_ranks: RankPool
) -> None:
    found = four_ranks.run(same_on_ranks_cases.with_batches, mesh, sizes, seeds)
    assert [rank for rank, one in enumerate(found) if one != "accepted"] == refusing
    assert all(found[rank].startswith("UsageError: input_ids is not the same") for rank in refusing)


@pytest.mark.parametrize(
    ("mesh", "seeds", "refusing"),
    [
        (Mesh(tp=4), [1, 1, 1, 1], []),
        (Mesh(tp=4), [1, 1, 2, 1], [0, 1, 2, 3]),
        (Mesh(tp=2, fsdp=2), [1, 1, 2, 2], []),
        (Mesh(tp=2, fsdp=2), [1, 1, 2, 3], [2, 3]),
        (Mesh(tp=2, ep=4, fsdp=2), [1, 1, 2, 2], [0, 1, 2, 3]),
    ],
    ids=str,
)
def test_random_states_are_compared_where_ranks_compute_together(
    mesh: Mesh, seeds: list[int], refusing: list[int], four_ranks: RankPool
) -> None:
    found = four_ranks.run(same_on_ranks_cases.with_random_states, mesh, seeds)
    assert [rank for rank, one in enumerate(found) if one != "accepted"] == refusing
    assert all(found[rank].startswith("UsageError: the random state is not the same") for rank in refusing)
