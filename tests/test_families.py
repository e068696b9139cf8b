"""A sample of `make families`."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.families import FAMILIES, run_family
from tests.runtime.rank_pool import RankPool


def test_there_are_at_least_as_many_families_as_were_tried() -> None:
    assert len(set(FAMILIES)) == len(FAMILIES) >= 42


@pytest.mark.parametrize(
    ("family", "mesh", "outcome", "why"),
    [
        ("OPTConfig", "tp=1, ep=1, fsdp=2", "proven", ""),
        ("InklingTextConfig", "tp=2, ep=1, fsdp=1", "refused", "hold gates together with their ups"),
        pytest.param("gemma4", "tp=2, ep=1, fsdp=1", "not fully proven", "vision_tower", marks=pytest.mark.full),
    ],
)
def test_a_row(family: str, mesh: str, outcome: str, why: str, two_ranks: RankPool, tmp_path: Path) -> None:
    for row in two_ranks.run(run_family, family, tmp_path):
        assert (row.mesh, row.outcome) == (mesh, outcome), row
        assert why in row.why
        assert row.back == ("" if outcome == "refused" else "3 files equal")
