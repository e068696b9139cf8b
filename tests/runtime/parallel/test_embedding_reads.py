"""A sharded embedding whose rows other modules read computes what the whole one does, gradients included."""

from __future__ import annotations

import pytest

from plans.mesh import Mesh
from runtime import run_on_ranks
from tests.runtime.parallel import embedding_cases
from tests.runtime.rank_pool import RankPool


@pytest.mark.parametrize("style", ["embedding_rowwise", "embedding_colwise"])
def test_rows_that_others_read_are_those_of_the_whole_embedding(style: str, two_ranks: RankPool) -> None:
    for found in two_ranks.run(embedding_cases.compare_reads, style, Mesh(tp=2)):
        assert max(found["output"], found["gradient"]) < 1e-13
        assert (found["is_sharded"], found["name"]) == (True, "Embedding")


def test_rows_are_read_where_the_embedding_is_sharded_over_data_ranks_too(four_ranks: RankPool) -> None:
    for found in four_ranks.run(embedding_cases.compare_reads, "embedding_rowwise", Mesh(tp=2, fsdp=2)):
        assert max(found["output"], found["gradient"]) < 1e-13


@pytest.mark.parametrize(
    ("style", "ranks", "vocabulary"),
    [("embedding_rowwise", 2, 24), ("embedding_rowwise", 3, 4), ("vocab_reduce_scatter", 2, 24)],
)  # of three ranks, the last has no row
def test_the_gradient_of_a_norm_inside_an_embedding_is_that_of_all_tokens(
    style: str, ranks: int, vocabulary: int
) -> None:
    for found in run_on_ranks(lambda: embedding_cases.compare_norms(style, vocabulary), ranks):
        assert max(found.values()) < 1e-13
