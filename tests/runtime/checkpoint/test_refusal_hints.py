"""Hints of refused checkpoints, each followed: what it names is then accepted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from plans.errors import DestinationError, HeaderError, IncompleteError, MigratorError, UsageError
from plans.mesh import Mesh
from runtime.checkpoint.resharding.execute import ReshardOptions, execute_reshard
from runtime.checkpoint.resharding.output_files import ReshardTarget
from runtime.checkpoint.resharding.plan import plan_reshard
from runtime.hub import check_repository, parse_hub_name

INDEX = "model.safetensors.index.json"
RANKS = ReshardTarget("ranks", Mesh(tp=2))


@pytest.fixture
def hub(tmp_path: Path, hub_folder: Callable[[str], Path]) -> Path:
    return Path(shutil.copytree(hub_folder("qwen3_moe"), tmp_path / "hub"))


def refuse(hub: Path, kind: type[MigratorError]) -> str:
    with pytest.raises(kind) as caught:
        plan_reshard(hub, target=RANKS)
    return f"{caught.value.message} | {caught.value.hint}"


def test_a_missing_file_is_copied(hub: Path) -> None:
    file = sorted(hub.glob("*.safetensors"))[1]
    kept = file.rename(hub.parent / file.name)
    assert f"{file.name}: missing, though {INDEX} names it | download or copy" in refuse(hub, IncompleteError)
    shutil.copy(kept, file)
    assert plan_reshard(hub, target=RANKS)


def test_the_target_of_a_broken_link_is_restored(hub: Path) -> None:
    file = sorted(hub.glob("*.safetensors"))[1]
    target = hub / "store" / file.name
    kept = file.rename(hub.parent / file.name)
    file.symlink_to(target)
    assert f"{file}: a broken link | restore its target" in refuse(hub, IncompleteError)
    target.parent.mkdir()
    shutil.copy(kept, target)
    assert plan_reshard(hub, target=RANKS)


@pytest.mark.parametrize(
    ("damage", "refusal"),
    [
        (lambda index: index.pop("weight_map"), "no weight_map from tensors to files | download the index again"),
        (
            lambda index: index["weight_map"].update({"lm_head.weight": "../model.safetensors"}),
            "an index may only name files in its own folder; do not trust this checkpoint",
        ),
    ],
    ids=["without map", "outside"],
)
def test_a_damaged_index_is_downloaded_again(hub: Path, damage: Callable[[object], object], refusal: str) -> None:
    content = (hub / INDEX).read_text("utf-8")
    index = json.loads(content)
    damage(index)
    (hub / INDEX).write_text(json.dumps(index), "utf-8")
    assert refusal in refuse(hub, HeaderError)
    (hub / INDEX).write_text(content, "utf-8")
    assert plan_reshard(hub, target=RANKS)


def test_a_destinations_folder_is_created_and_memory_allowed(hub: Path, tmp_path: Path) -> None:
    plan, out = plan_reshard(hub, target=RANKS), tmp_path / "new" / "out"
    with pytest.raises(DestinationError, match="new: not a folder") as caught:
        execute_reshard(plan, out)
    assert caught.value.hint == "create it first"
    out.parent.mkdir()
    with pytest.raises(UsageError, match="max_memory must be at least 1 MiB, got 1000 bytes") as refused:
        execute_reshard(plan, out, ReshardOptions(max_memory=1000))
    assert refused.value.hint == "allow 1 MiB or more"
    execute_reshard(plan, out, ReshardOptions(max_memory=2**20))
    assert (out / "migrator.json").is_file()


def test_repositories_are_written_as_hints_say() -> None:
    with pytest.raises(UsageError, match="hf://owner: not a repository") as caught:
        parse_hub_name("hf://owner")
    assert caught.value.hint == "write hf://owner/name or hf://owner/name@revision"
    assert parse_hub_name("hf://owner/name@revision")
    with pytest.raises(UsageError, match="not a repository to push to") as refused:
        check_repository("owner/name@main")
    assert refused.value.hint == "write owner/name"
    check_repository("owner/name")
