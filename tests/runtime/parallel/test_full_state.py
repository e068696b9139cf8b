"""A parallel model gathered on one rank: every tensor as it was, in every layout, and saved by `save_pretrained`."""

from __future__ import annotations

from typing import Any

import pytest

from plans.mesh import Mesh
from tests.runtime.checks import wrong_entry_cases
from tests.runtime.rank_pool import RankPool


@pytest.mark.parametrize(
    ("name", "mode", "mesh"),
    [
        ("llama", "tp", Mesh(tp=2)),
        ("llama", "sp", Mesh(tp=2)),
        ("qwen3_moe", "tp", Mesh(tp=2)),
        ("qwen3_moe", "ep", Mesh(tp=2, ep=2)),
        ("qwen3_moe", "tp", Mesh(tp=2, fsdp=2)),
        ("llama", "tp", Mesh(tp=2, replicate=2)),
        ("qwen3_moe", "tp_ep", Mesh(ep=2, fsdp=2, replicate=2)),
        ("qwen3_moe", "tp_ep", Mesh(tp=2, ep=4, fsdp=2)),
        ("qwen3_moe", "tp_ep", Mesh(tp=2, ep=2, fsdp=2)),
    ],
    ids=str,
)
def test_a_parallel_model_is_saved_whole_bit_for_bit(
    name: str, mode: Any, mesh: Mesh, request: pytest.FixtureRequest
) -> None:
    pool: RankPool = request.getfixturevalue("two_ranks" if mesh.world_size == 2 else "four_ranks")
    for message, count, differing in pool.run(wrong_entry_cases.saved, name, mode, mesh):
        assert "a parallel model cannot save itself" in message
        assert "runtime.full_state_dict(model)" in message
        assert count > 15
        assert differing == []


@pytest.mark.parametrize("mesh", [Mesh(tp=2, fsdp=2), Mesh(tp=2, ep=4, fsdp=2)], ids=str)
def test_it_is_whole_after_a_step_too(mesh: Mesh, four_ranks: RankPool) -> None:
    assert four_ranks.run(wrong_entry_cases.saved_after_a_step, mesh) == [[]] * 4
