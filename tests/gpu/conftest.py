"""Two ranks with a GPU each, joined by NCCL. Tests that need more GPUs than there are are skipped, and say so."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.runtime.rank_pool import RankPool


@pytest.fixture(scope="session")
def one_gpu() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU, here is none")
    return torch.device("cuda", 0)


@pytest.fixture(scope="session")
def two_gpus() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two GPUs, here are {torch.cuda.device_count()}")


@pytest.fixture(scope="session")
def gpu_ranks(two_gpus: None) -> Iterator[RankPool]:
    pool = RankPool(2, backend="nccl")
    yield pool
    pool.close()
