"""What all tests share: the quick ones, Gloo ranks, and tiny checkpoints, each made once for the session."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

from plans.mesh import Mesh

if TYPE_CHECKING:  # `make quick` runs without torch
    from tests.runtime.rank_pool import RankPool

HubFolder = Callable[[str], Path]
RankFolder = Callable[[str, int], Path]

# Two processes whose threads wait for each other in a loop stand in each other's way: tiny models need one thread.
os.environ.setdefault("OMP_NUM_THREADS", "1")

TESTS = Path(__file__).parent
SOURCE_SIDE = [
    TESTS / name
    for name in (
        *("plans", "codemods", "migrator/formats", "migrator/options", "migrator/terminal"),
        *(f"migrator/commands/test_{name}.py" for name in ("check", "diff", "explain", "rewrite", "rewrite_survives")),
        *(f"migrator/test_{name}.py" for name in ("cli", "source_side_portability", "workflow_docs")),
        *("migrator/test_workflow_pre_commit.py", "test_structure.py"),
    )
]
NOT_QUICK = {"installed_transformers", "hub_folder", "two_ranks", "four_ranks"}
"""Fixtures of tests that are not quick, whichever folder they are in."""

# How long an example takes says something about the machine, not about the code.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out what `-m quick` does not select before it is imported, since it imports torch."""
    if config.getoption("markexpr") != "quick":
        return None
    related = any(collection_path.is_relative_to(path) or path.is_relative_to(collection_path) for path in SOURCE_SIDE)
    return None if related else True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of the source side as quick, except for long ones and those of installed packages."""
    for item in items:
        is_quick = any(item.path.is_relative_to(path) for path in SOURCE_SIDE)
        is_long = any(item.get_closest_marker(name) for name in ("full", "network", "slow"))
        if is_quick and not is_long and NOT_QUICK.isdisjoint(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.quick)


@pytest.fixture(autouse=True)
def _collector() -> Iterator[None]:
    """Wake the garbage collector after a test: commands of short processes put it to rest, and run in this one here."""
    yield
    gc.enable()


@pytest.fixture(scope="session")
def installed_transformers() -> Path:
    """Return the folder of the installed transformers."""
    spec = find_spec("transformers")
    if spec is None or spec.origin is None:
        pytest.skip("transformers is not installed")
    return Path(spec.origin).parent


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[RankPool]:
    yield from start_ranks(2)


@pytest.fixture(scope="session")
def four_ranks() -> Iterator[RankPool]:
    yield from start_ranks(4)


def start_ranks(world_size: int) -> Iterator[RankPool]:
    from tests.runtime.rank_pool import RankPool

    pool = RankPool(world_size)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def hub_folder(tmp_path_factory: pytest.TempPathFactory) -> HubFolder:
    """Return a function from a tiny model's name to the folder its save_pretrained wrote."""
    from tests.tiny_models import tiny_config, tiny_model

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
    from runtime.checkpoint.resharding.execute import execute_reshard
    from runtime.checkpoint.resharding.plan import plan_reshard

    folders: dict[tuple[str, int], Path] = {}

    def resharded(name: str, tp: int) -> Path:
        if (name, tp) not in folders:
            folders[name, tp] = tmp_path_factory.mktemp(name) / "ranks"
            execute_reshard(plan_reshard(hub_folder(name), Mesh(tp=tp)), folders[name, tp])
        return folders[name, tp]

    return resharded
