"""Pickled hub form: what torch.save and huggingface_hub write becomes what safetensors of the same model become."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file

from plans.errors import ConversionError, HeaderError, IncompleteError, MigratorError
from plans.mesh import Mesh
from runtime.checkpoint.files.file_names import PICKLED_INDEX, PICKLED_WEIGHTS
from runtime.checkpoint.open import open_checkpoint
from runtime.checkpoint.resharding.execute import execute_reshard
from runtime.checkpoint.resharding.output_files import ReshardTarget
from runtime.checkpoint.resharding.plan import plan_reshard
from runtime.checkpoint.verifying.verify import verify
from runtime.inspecting.inspection import inspect_checkpoint
from tests.conftest import HubFolder

Saved = Callable[[str], Path]
State = dict[str, torch.Tensor]


def load_hub(folder: Path) -> State:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def with_config(hub: Path, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    shutil.copy(hub / "config.json", folder)
    return folder


def save_one(hub: Path, folder: Path) -> Path:
    torch.save(load_hub(hub), with_config(hub, folder) / PICKLED_WEIGHTS)
    return folder


def save_with_index(hub: Path, folder: Path) -> Path:
    save_torch_state_dict(load_hub(hub), with_config(hub, folder), max_shard_size="40KB", safe_serialization=False)
    assert (folder / PICKLED_INDEX).is_file()
    return folder


def save_beside_state(hub: Path, folder: Path) -> Path:
    """What a training script of one's own saves."""
    torch.save({"step": 7, "model": load_hub(hub)}, with_config(hub, folder) / "latest.pt")
    torch.save({"state": {}, "param_groups": []}, folder / "optimizer.pt")
    return folder


def save_views(hub: Path, folder: Path) -> Path:
    """Weights that lie transposed, or as slices of one storage."""
    state = load_hub(hub)
    rows = torch.cat([tensor.reshape(-1) for tensor in state.values()])
    sizes = [tensor.numel() for tensor in state.values()]
    views = {name: part.view(state[name].shape) for name, part in zip(state, rows.split(sizes), strict=True)}
    turned = {name: tensor.t().contiguous().t() for name, tensor in list(state.items())[::3] if tensor.ndim == 2}
    torch.save({**views, **turned}, with_config(hub, folder) / "model.pth")
    return folder


WRITERS = (save_one, save_with_index, save_beside_state, save_views)


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_pickled_weights_become_what_safetensors_become(
    family: str, write: Callable[[Path, Path], Path], checkpoint: Saved, tmp_path: Path
) -> None:
    hub = checkpoint(family)
    pickled = write(hub, tmp_path / "pickled")
    execute_reshard(plan_reshard(pickled, target=ReshardTarget("ranks", Mesh(tp=2))), tmp_path / "ranks")
    execute_reshard(plan_reshard(hub, target=ReshardTarget("ranks", Mesh(tp=2))), tmp_path / "expected")
    for file in sorted((tmp_path / "expected").glob("*.safetensors")):
        assert (tmp_path / "ranks" / file.name).read_bytes() == file.read_bytes()
    execute_reshard(plan_reshard(pickled, target=ReshardTarget("hf")), tmp_path / "hub")
    assert {name: tensor.tolist() for name, tensor in load_hub(tmp_path / "hub").items()} == {
        name: tensor.tolist() for name, tensor in load_hub(hub).items()
    }
    assert not [path.name for path in (tmp_path / "hub").iterdir() if path.suffix in (".bin", ".pt", ".pth")]
    assert verify(pickled, hub).ok
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hub", output_loading_info=True)[1]
    assert not loaded["missing_keys"]


def test_it_is_inspected_as_hub_form(checkpoint: Saved, tmp_path: Path) -> None:
    inspected = inspect_checkpoint(save_beside_state(checkpoint("llama"), tmp_path / "pickled"))
    assert inspected.layout == "hf"
    left = {left.name: left.reason for left in inspected.left_behind}
    assert left["'step' in latest.pt"] == "beside the model"
    assert left["optimizer.pt"] == "the state of an optimizer, a scheduler or a sampler"


def test_safetensors_beside_pickles_are_preferred(checkpoint: Saved, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint("llama"), tmp_path / "hub"))
    torch.save({"w": torch.zeros(2)}, folder / PICKLED_WEIGHTS)
    left = [str(left) for left in open_checkpoint(folder).read_headers().side_files.left_behind]
    assert any(text.startswith(PICKLED_WEIGHTS) for text in left)


@pytest.fixture
def tied(hub_folder: HubFolder, tmp_path: Path) -> tuple[Any, Path]:
    model = transformers.AutoModelForCausalLM.from_pretrained(hub_folder("llama"))
    return model.state_dict(), with_config(hub_folder("llama"), tmp_path / "tied")


def test_tied_weights_are_stored_under_both_names(tied: tuple[Any, Path]) -> None:
    state, folder = tied
    turned = state["lm_head.weight"].t().contiguous().t()
    for weight in (state["lm_head.weight"], turned):
        torch.save({**state, "lm_head.weight": weight, "model.embed_tokens.weight": weight}, folder / PICKLED_WEIGHTS)
        assert open_checkpoint(folder).read_headers().tied == {"lm_head.weight": "model.embed_tokens.weight"}
    torch.save({**state, "lm_head.weight": state["lm_head.weight"].clone()}, folder / PICKLED_WEIGHTS)
    open_checkpoint(folder).read_headers()


def test_tied_weights_must_be_equal(tied: tuple[Any, Path]) -> None:
    state, folder = tied
    square = torch.randn(101, 101)
    others = {
        "other values": (state["lm_head.weight"], state["lm_head.weight"] + 1),
        "another view of one storage": (square[:, :32], square.t()[:, :32]),
        "another offset in one storage": (square[:, :32], square[:, 1:33]),
        "a view and none": (square[:, :32], square[:, :32].contiguous()),
    }
    for embedding, head in others.values():
        torch.save({**state, "model.embed_tokens.weight": embedding, "lm_head.weight": head}, folder / PICKLED_WEIGHTS)
        with pytest.raises(ConversionError, match="stored with other values"):
            open_checkpoint(folder).read_headers()


def edit_index(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    index = json.loads((folder / PICKLED_INDEX).read_text())
    change(index["weight_map"])
    (folder / PICKLED_INDEX).write_text(json.dumps(index))


def first_file(folder: Path) -> Path:
    return min(folder.glob("*.bin"))


BROKEN: dict[str, tuple[Callable[[Path], object], type[MigratorError], str]] = {
    "a file is missing": (lambda folder: first_file(folder).unlink(), IncompleteError, f"though {PICKLED_INDEX} names"),
    "a file is cut": (
        lambda folder: first_file(folder).write_bytes(first_file(folder).read_bytes()[:-500]),
        HeaderError,
        "is not a zip archive",
    ),
    "a pointer": (
        lambda folder: first_file(folder).write_text("version https://git-lfs.github.com/spec/v1\n"),
        IncompleteError,
        "a Git LFS pointer",
    ),
    "a tensor that no file has": (
        lambda folder: edit_index(folder, lambda names: names.update({"more": first_file(folder).name})),
        IncompleteError,
        "'more' is not in",
    ),
    "a tensor in another file": (
        lambda folder: edit_index(folder, lambda names: names.update({next(iter(names)): max(names.values())})),
        HeaderError,
        r"(?s)but it is in.*hint: the index belongs to another version of the checkpoint; download both again",
    ),
    "a file outside": (
        lambda folder: edit_index(folder, lambda names: names.update({"more": "../other.bin"})),
        HeaderError,
        "not a torch.save file of this folder",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_folder_has_one_clear_error(case: str, checkpoint: Saved, tmp_path: Path) -> None:
    change, error, words = BROKEN[case]
    folder = save_with_index(checkpoint("qwen3_moe"), tmp_path / "pickled")
    change(folder)
    with pytest.raises(error, match=words) as caught:
        plan_reshard(folder, target=ReshardTarget("hf"))
    assert "\n" not in caught.value.message
    assert caught.value.hint
