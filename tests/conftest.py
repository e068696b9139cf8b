"""Gloo ranks, real tiny checkpoints and their rank files, each made once for the session."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from plans.mesh import Mesh
from runtime.checkpoint.resharding.execute import execute_reshard
from runtime.checkpoint.resharding.plan import plan_reshard
from tests.runtime.rank_pool import RankPool
from tests.tiny_models import tiny_config, tiny_model

HubFolder = Callable[[str], Path]
RankFolder = Callable[[str, int], Path]


@pytest.fixture(autouse=True)
def _collector() -> Iterator[None]:
    """Wake the garbage collector after a test: commands of short processes put it to rest, and run in this one here."""
    yield
    gc.enable()


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[RankPool]:
    pool = RankPool(2)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def four_ranks() -> Iterator[RankPool]:
    pool = RankPool(4)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def hub_folder(tmp_path_factory: pytest.TempPathFactory) -> HubFolder:
    """Return a function from a tiny model's name to the folder its save_pretrained wrote."""
    folders: dict[str, Path] = {}

    def saved(name: str) -> Path:
        if name not in folders:
            model = tiny_model(tiny_config(name), seed=len(folders))
            folders[name] = tmp_path_factory.mktemp(name) / "hub"
            model.save_pretrained(folders[name], max_shard_size="60KB")
        return folders[name]

    return saved


@pytest.fixture(scope="session")
def rank_folder(tmp_path_factory: pytest.TempPathFactory, hub_folder: HubFolder) -> RankFolder:
    """Return a function from a tiny model's name and a size to its rank files; tests that damage them copy first."""
    folders: dict[tuple[str, int], Path] = {}

    def resharded(name: str, tp: int) -> Path:
        if (name, tp) not in folders:
            folders[name, tp] = tmp_path_factory.mktemp(name) / "ranks"
            execute_reshard(plan_reshard(hub_folder(name), Mesh(tp=tp)), folders[name, tp])
        return folders[name, tp]

    return resharded
