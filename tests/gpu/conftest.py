"""Two ranks with a GPU each, joined by NCCL; without two GPUs every test here is skipped, and says so."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.runtime.rank_pool import RankPool


@pytest.fixture(scope="session", autouse=True)
def _two_gpus() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two GPUs, here are {torch.cuda.device_count()}")


@pytest.fixture(scope="session")
def gpu_ranks(_two_gpus: None) -> Iterator[RankPool]:
    pool = RankPool(2, backend="nccl")
    yield pool
    pool.close()
