"""What torch's writer saves of a tensor in several chunks: complete as .distcp files, lossy as safetensors files."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

from plans.errors import CheckpointError, IncompleteError
from runtime.checkpoint.files.file_names import INDEX
from runtime.checkpoint.resharding.execute import execute_reshard
from runtime.checkpoint.resharding.output_files import ReshardTarget
from runtime.checkpoint.resharding.plan import plan_reshard
from runtime.checkpoint.verifying.verify import verify
from tests.conftest import HubFolder
from tests.runtime.checkpoint.dcp.torch_exchange import FORMS, PIECES, cut

HUB = ReshardTarget("hf")
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
DOWN = "model.layers.0.mlp.down_proj.weight"

Change = Callable[[dict[str, Any]], object]
Save = Callable[..., Path]


@pytest.fixture
def save(hub_folder: HubFolder, tmp_path: Path) -> Save:
    def saved(form: str, change: Change = lambda state: None) -> Path:
        folder, hub = tmp_path / form, hub_folder("llama")
        state: dict[str, Any] = {n: t for file in hub.glob("*.safetensors") for n, t in load_file(file).items()}
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
        change(state)
        if form == "distcp":
            dcp.save(state, checkpoint_id=folder, no_dist=True)
        else:
            arguments: dict[str, Any] = dict(FORMS[form])
            dcp.save(state, storage_writer=HuggingFaceStorageWriter(str(folder), **arguments), no_dist=True)
        shutil.copy(hub / "config.json", folder)
        return folder

    return saved


def in_pieces(name: str, order: str) -> Change:
    def change(state: dict[str, Any]) -> None:
        state[name] = cut(state.get(name, torch.ones(8, 4)), PIECES[order])

    return change


@pytest.mark.parametrize("form", [*FORMS, "distcp"])
def test_what_torch_saved_whole_is_read(form: str, save: Save, tmp_path: Path) -> None:
    folder = save(form)
    execute_reshard(plan_reshard(folder, target=HUB), tmp_path / "hub")
    assert not verify(folder, tmp_path / "hub").differences


@pytest.mark.parametrize("order", PIECES)
def test_distcp_files_have_every_chunk(order: str, save: Save, hub_folder: HubFolder) -> None:
    """The next step that the refusal below names."""
    assert not verify(save("distcp", in_pieces(DOWN, order)), hub_folder("llama")).differences


@pytest.mark.parametrize("order", PIECES)
@pytest.mark.parametrize("form", FORMS)
def test_a_tensor_of_the_model_without_all_chunks_is_lossy(form: str, order: str, save: Save) -> None:
    folder = save(form, in_pieces(DOWN, order))
    with pytest.raises(IncompleteError, match="the checkpoint is lossy") as caught:
        plan_reshard(folder, target=HUB)
    assert "save again, as .distcp files" in caught.value.hint
    if "lossy" in caught.value.data:
        assert list(caught.value.data["lossy"]) == [DOWN]
        assert [row.aspect for row in verify(folder).differences] == ["lossy"]


@pytest.mark.parametrize(
    ("form", "order"),
    [("shards", "in order"), ("whole", "in order"), ("whole", "backwards"), ("consolidated", "in order")],
)
def test_so_is_a_tensor_that_the_model_does_not_have(form: str, order: str, save: Save) -> None:
    with pytest.raises(IncompleteError, match="the checkpoint is lossy"):
        plan_reshard(save(form, in_pieces("more.weight", order)), target=HUB)


def test_an_index_that_counts_too_little_is_no_loss(save: Save) -> None:
    folder = save("whole")
    (folder / INDEX).write_text((folder / INDEX).read_text().replace('"total_size": ', '"total_size": 0, "other": '))
    plan_reshard(folder, target=HUB)


def test_shard_files_of_other_tensors_do_not_matter(save: Save) -> None:
    folder = save("consolidated")
    (folder / "sharded" / "notes.txt").write_text("no shard")
    path = folder / "sharded" / "shard-00002-model-00001-of-00001.safetensors"
    save_file({"unrelated": torch.ones(2)}, path)
    plan_reshard(folder, target=HUB)


def test_a_damaged_shard_file_is_named(save: Save) -> None:
    folder = save("consolidated")
    (path,) = (folder / "sharded").iterdir()
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=path.name):
        plan_reshard(folder, target=HUB)
