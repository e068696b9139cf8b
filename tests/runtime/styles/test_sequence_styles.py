"""Slices of the sequence: each style against the plain module, and the branch's own SP plans on whole models."""

from __future__ import annotations

from typing import Any

import pytest

from plans.errors import IndivisibleError
from plans.mesh import Mesh
from tests.runtime.rank_pool import RankPool
from tests.runtime.styles import sequence_cases

HIDDEN = (2, 8, 6)
HEADS = (2, 3, 8, 6)


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize(
    ("case", "shape"),
    [
        ("activation", HIDDEN),
        ("activation_seq_dim_2", HEADS),
        ("module_allgather", HIDDEN),
        ("module_allgather_split", HIDDEN),
        ("module_allgather_split of several", HIDDEN),
        ("module_allgather_split of rows", HIDDEN),
    ],
)
def test_output_and_gradients_equal_those_of_the_plain_modules(
    case: str, shape: tuple[int, ...], world_size: int, request: pytest.FixtureRequest
) -> None:
    for errors in pool(request, world_size).run(sequence_cases.style_errors, case, shape):
        assert len(errors) > 3
        assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("bias", [True, False])
def test_a_row_wise_layer_scatters_its_sum_and_adds_its_bias_once(
    bias: bool, world_size: int, request: pytest.FixtureRequest
) -> None:
    for errors in pool(request, world_size).run(rowwise_with_bias if bias else rowwise_without_bias):
        assert ("part.bias" in errors) == bias
        assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize(
    ("case", "shape"),
    [("activation", (2, 7, 6)), ("activation_seq_dim_2", (2, 4, 7, 6)), ("module_allgather", (2, 7, 6))],
)
def test_a_sequence_that_does_not_divide_is_refused(case: str, shape: tuple[int, ...], two_ranks: RankPool) -> None:
    with pytest.raises(IndivisibleError, match="tp=2 does not divide the sequence length, 7") as caught:
        two_ranks.run(sequence_cases.style_errors, case, shape)
    assert "pad the batch to 8 tokens" in caught.value.hint


def test_the_models_own_sequence_plan_is_used_unchanged(two_ranks: RankPool) -> None:
    for name, entries in sequence_cases.PLANS.items():
        wanted = {f"model.{key}": style for key, style in entries.items()} | {"lm_head": "colwise_gather_output"}
        assert two_ranks.run(sequence_cases.branch_plan, name) == [wanted] * 2


@pytest.mark.parametrize(
    ("name", "mode", "mesh"),
    [
        ("llama", "sp", Mesh(tp=2)),
        ("llama", "sp", Mesh(tp=4)),
        ("qwen3_moe", "sp", Mesh(tp=2)),
        ("qwen3_moe", "sp", Mesh(tp=2, fsdp=2)),
        ("qwen3_moe", "sp_ep", Mesh(tp=2, ep=2)),
        ("qwen3_moe", "sp_ep", Mesh(tp=2, ep=4, fsdp=2)),
    ],
    ids=str,
)
def test_the_branchs_sequence_plans_compute_the_same_as_the_whole_model(
    name: str, mode: Any, mesh: Mesh, request: pytest.FixtureRequest
) -> None:
    for errors in pool(request, mesh.world_size).run(sequence_cases.branch_errors, name, mode, mesh):
        assert len(errors) > 15
        assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("mesh", [Mesh(tp=2), Mesh(tp=4), Mesh(tp=2, fsdp=2)], ids=str)
def test_embeddings_can_replace_tokens(name: str, mesh: Mesh, request: pytest.FixtureRequest) -> None:
    for errors in pool(request, mesh.world_size).run(sequence_cases.embedding_errors, name, mesh):
        assert max(errors.values()) < 1e-5, errors


def rowwise_with_bias() -> dict[str, float]:
    return sequence_cases.rowwise_errors(bias=True)


def rowwise_without_bias() -> dict[str, float]:
    return sequence_cases.rowwise_errors(bias=False)


def pool(request: pytest.FixtureRequest, world_size: int) -> RankPool:
    ranks: RankPool = request.getfixturevalue({2: "two_ranks", 4: "four_ranks"}[world_size])
    return ranks
