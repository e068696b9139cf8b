"""Hints of refused checkpoints, each followed: what it names is then accepted."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from functools import reduce
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from plans.errors import (
    CheckpointError,
    ConversionError,
    DestinationError,
    HeaderError,
    IncompleteError,
    MigratorError,
    UsageError,
)
from plans.mesh import Mesh
from runtime.checkpoint.checkpoint import read_config_entries
from runtime.checkpoint.dcp.metadata import read_metadata
from runtime.checkpoint.external.files import read_external_files
from runtime.checkpoint.external.source import ExternalSettings, FilePattern, SeparateConfig
from runtime.checkpoint.files.reading import read_at_most
from runtime.checkpoint.resharding.execute import ReshardOptions, execute_reshard
from runtime.checkpoint.resharding.output_files import ReshardTarget
from runtime.checkpoint.resharding.plan import plan_reshard
from runtime.hub import check_repository, parse_hub_name, resolve_folder
from runtime.models.dtypes import DTYPES

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
        (
            lambda index: index.update(more=reduce(lambda inner, _: [inner], range(17), 0)),
            "nested more than 16 deep | the index is damaged; download it again",
        ),
    ],
    ids=["without map", "outside", "nested"],
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
    assert caught.value.hint == (
        "write hf://owner/name, with @revision or /folder behind it if you like, or hf://buckets/owner/name/folder"
    )
    assert parse_hub_name("hf://owner/name@revision")
    with pytest.raises(UsageError, match="not a repository to push to") as refused:
        check_repository("owner/name@main")
    assert refused.value.hint == "write owner/name"
    check_repository("owner/name")


def test_an_index_of_any_length_is_not_read(hub: Path) -> None:
    content = (hub / INDEX).read_bytes()
    os.truncate(hub / INDEX, 2**30)
    assert "the index is damaged; save it again" in refuse(hub, HeaderError)
    (hub / INDEX).write_bytes(content)
    assert plan_reshard(hub, target=RANKS)


def test_the_experts_of_one_matrix_have_one_dtype(hub: Path) -> None:
    name = "model.layers.0.mlp.experts.1.down_proj.weight"
    file = hub / json.loads((hub / INDEX).read_text("utf-8"))["weight_map"][name]
    tensors = load_file(file)
    save_file(tensors | {name: tensors[name].half()}, file, {"format": "pt"})
    refusal = refuse(hub, ConversionError)
    assert "would mix dtypes" in refusal
    assert refusal.endswith(" | save the checkpoint in one dtype")
    for path in hub.glob("*.safetensors"):
        halves = {name: tensor.to(torch.float16) for name, tensor in load_file(path).items()}
        save_file(halves, path, {"format": "pt"})
    assert plan_reshard(hub, target=RANKS)


def test_what_cannot_be_read_is_named_with_what_to_look_at(tmp_path: Path) -> None:
    looped, small = tmp_path / "loop", tmp_path / "small"
    looped.symlink_to(looped)
    with pytest.raises(CheckpointError, match="loop: cannot be read: ") as caught:
        read_at_most(looped, 3)
    assert caught.value.hint == "check that the disk is well and that you may read it"
    steps = {
        "absent": "check its name, and that it was not moved",
        "small/absent": "check its name: something on the way there is no folder",
    }
    small.write_text("long", "utf-8")
    for name, step in steps.items():
        with pytest.raises(CheckpointError, match="cannot be read: ") as caught:
            read_at_most(tmp_path / name, 3)
        assert caught.value.hint == step
    with pytest.raises(CheckpointError, match="over 3 bytes") as refused:
        read_at_most(small, 3)
    assert refused.value.hint == "name another file"
    small.write_text("yes", "utf-8")
    looped.unlink()
    looped.symlink_to(small)
    assert read_at_most(looped, 3) == b"yes"


def test_a_config_that_is_no_json_is_restored(hub: Path) -> None:
    content = (hub / "config.json").read_text("utf-8")
    (hub / "config.json").write_text(content[:-3], "utf-8")
    with pytest.raises(CheckpointError, match=r"config\.json: not valid JSON: ") as caught:
        read_config_entries(hub)
    assert caught.value.hint == "restore the file, or save the checkpoint again"
    (hub / "config.json").write_text(content, "utf-8")
    assert read_config_entries(hub) == json.loads(content)


def test_metadata_of_any_length_are_not_read(tmp_path: Path) -> None:
    (tmp_path / ".metadata").touch()
    os.truncate(tmp_path / ".metadata", 2**26 + 1)
    with pytest.raises(HeaderError, match=r"\.metadata: over 67108864 bytes") as caught:
        read_metadata(tmp_path)
    assert caught.value.hint == "save the checkpoint in safetensors form"


def test_ranks_of_one_kind_have_one_size() -> None:
    pattern = FilePattern("{rank}.safetensors")
    with pytest.raises(UsageError, match="has one kind of ranks") as caught:
        ExternalSettings(pattern, from_tp=2, from_ep=4, from_mode="ep")
    assert caught.value.hint == "give both the same size"
    assert ExternalSettings(pattern, from_tp=4, from_ep=4, from_mode="ep").mesh.world_size == 4


def test_a_config_elsewhere_is_named(hub: Path, tmp_path: Path) -> None:
    with pytest.raises(IncompleteError, match=r"no config\.json") as caught:
        SeparateConfig.read(tmp_path)
    assert caught.value.hint == "name a config.json, or its folder, with `config`"
    assert SeparateConfig.read(hub).text == (hub / "config.json").read_bytes()


def test_a_source_that_is_not_there_is_named(hub: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder") as caught:
        resolve_folder(str(hub / "weights" / "none"))
    assert caught.value.hint == "name a checkpoint's folder, hf://owner/name or s3://bucket/folder"
    assert resolve_folder(str(hub)) == hub


PARTS = "r{rank}-{part}.safetensors"


@pytest.mark.parametrize(
    ("names", "kind", "refusal"),
    [
        (("r0-0", "r0-2"), IncompleteError, "part 1 of rank 0 is missing | copy the missing files"),
        (
            ("r0-0", "r0-1"),
            HeaderError,
            "is also in r0-0.safetensors | the files belong to several checkpoints; move those of the others away",
        ),
    ],
    ids=["a part", "twice"],
)
def test_parts_of_ranks_are_those_of_one_checkpoint(
    names: tuple[str, str], kind: type[MigratorError], refusal: str, tmp_path: Path
) -> None:
    for name in names:
        save_file({"weight": torch.zeros(2)}, tmp_path / f"{name}.safetensors")
    settings = ExternalSettings(FilePattern(PARTS))
    with pytest.raises(kind) as caught:
        read_external_files(tmp_path, settings)
    assert f"{caught.value.message} | {caught.value.hint}".endswith(refusal)
    (tmp_path / f"{names[1]}.safetensors").rename(tmp_path / "elsewhere")
    save_file({"other": torch.zeros(2)}, tmp_path / "r0-1.safetensors")
    assert read_external_files(tmp_path, settings).tensor_names == ("weight", "other")
    with pytest.raises(CheckpointError, match="not a folder") as refused:
        read_external_files(tmp_path / "elsewhere", settings)
    assert refused.value.hint == "name the folder with the rank files"


def test_a_dtype_that_torch_lacks_needs_a_newer_one(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(DTYPES, "F32")  # type: ignore[arg-type]
    with pytest.raises(ConversionError, match="is F32, which torch lacks") as caught:
        plan_reshard(hub, target=ReshardTarget("hf", experts="fused"))
    assert caught.value.hint == "use a newer torch"
    monkeypatch.undo()
    assert plan_reshard(hub, target=ReshardTarget("hf", experts="fused"))
