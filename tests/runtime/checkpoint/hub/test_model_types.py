"""Every model type that transformers converts: read, written and turned round as transformers loads and saves it."""

from __future__ import annotations

import gc
import shutil
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from plans.errors import PlanError
from plans.mesh import Mesh
from runtime.checkpoint.files.file_names import WEIGHTS
from runtime.checkpoint.resharding.execute import execute_reshard
from runtime.checkpoint.resharding.output_files import ReshardTarget
from runtime.checkpoint.resharding.plan import plan_reshard
from tests.rank_files import assembled
from tests.runtime.checkpoint.hub.tiny_types import UNBUILT, model_classes, tiny_type

HUB = ReshardTarget("hf")
SAMPLE = {
    "dory": "two stored layers for one",
    "ernie4_5_vl_moe": "text and vision experts of one list",
    "lara_mini": "one tensor split into four",
    "inkling2_text": "gate and up interleaved, layers counted from another number",
    "inkling2": "a vocabulary padded with rows of zeros",
    "inkling2_loop_text": "a vocabulary padded, message queries merged",
    "kimi_k25": "rotary pairs, names that take each other's place",
    "qwen3_vl_moe": "transposed by shape",
    "Qwen2VLForConditionalGeneration": "prefixes moved",
    "gemma3": "prefixes moved",
    "llava": "prefixes moved",
    "mllama": "prefixes moved, tied",
    "mistral_large4": "rotary pairs of the vision tower alone",
    "pi0": "prefixes dropped",
    "sarvam_moe": "one tensor split into unequal parts",
}


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return all(found[name].dtype == expected[name].dtype and found[name].equal(expected[name]) for name in found)


def there_and_back(model: transformers.PreTrainedModel, folder: Path) -> bool:
    """Compare every form of a model with transformers' own; return whether it has a plan to lay it out by."""
    kind, hub = type(model), folder / "hub"
    model.save_pretrained(hub)
    loaded = kind.from_pretrained(hub).state_dict()
    execute_reshard(plan_reshard(hub, target=ReshardTarget("hf", experts="fused")), folder / "fused")
    fused = kind.from_pretrained(folder / "fused").state_dict()
    assert fused.keys() == loaded.keys()
    assert same(fused, loaded), "fused"
    execute_reshard(plan_reshard(folder / "fused", target=ReshardTarget("hf", experts="separate")), folder / "separate")
    assert (folder / "separate" / WEIGHTS).read_bytes() == (hub / WEIGHTS).read_bytes(), "separate"
    try:
        plan = plan_reshard(hub, Mesh())
    except PlanError:
        return False
    manifest = execute_reshard(plan, folder / "ranks").manifest
    found = assembled(folder / "ranks")
    assert found.keys() | manifest.tied.keys() == loaded.keys()
    assert same(found, loaded), "ranks"
    execute_reshard(plan_reshard(folder / "ranks", target=HUB), folder / "again")
    for file in hub.iterdir():
        assert file.read_bytes() == (folder / "again" / file.name).read_bytes(), file.name
    return True


@pytest.mark.filterwarnings("ignore")  # what models warn of when they are built is not ours
@pytest.mark.parametrize("key", SAMPLE)
def test_a_type_there_and_back(key: str, tmp_path: Path) -> None:
    if key not in model_classes():
        pytest.skip(f"transformers {transformers.__version__} has no {key}")
    there_and_back(tiny_type(key), tmp_path)


@pytest.mark.full
def test_every_type_there_and_back(tmp_path: Path) -> None:
    keys = model_classes().keys()
    assert UNBUILT.keys() <= keys
    failed: dict[str, str] = {}
    laid_out = 0
    for key in sorted(keys - UNBUILT.keys()):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                laid_out += there_and_back(tiny_type(key), tmp_path / key)
        except Exception as error:  # Each type is told of, whatever is wrong with it.
            failed[key] = f"{type(error).__name__}: {error}"[:300]
        gc.collect()
        shutil.rmtree(tmp_path / key, ignore_errors=True)
    assert failed == {}
    assert laid_out > 100


@pytest.mark.parametrize(
    "prefixes", [{}, {"model.language_model.": "language_model.model.", "lm_head": "language_model.lm_head"}]
)
def test_names_of_older_releases_come_back(prefixes: dict[str, str], tmp_path: Path) -> None:
    """Llava's checkpoints have been stored under two sets of names; both load, and each comes back as it was."""
    model = tiny_type("llava")
    model.save_pretrained(tmp_path / "hub")
    tensors = load_file(tmp_path / "hub" / WEIGHTS)
    for new, old in prefixes.items():
        tensors = {name.replace(new, old) if name.startswith(new) else name: tensor for name, tensor in tensors.items()}
    save_file(tensors, tmp_path / "hub" / WEIGHTS, metadata={"format": "pt"})
    loaded = type(model).from_pretrained(tmp_path / "hub").state_dict()
    execute_reshard(plan_reshard(tmp_path / "hub", Mesh(tp=2)), tmp_path / "ranks")
    assert same(assembled(tmp_path / "ranks"), loaded)
    execute_reshard(plan_reshard(tmp_path / "ranks", target=HUB), tmp_path / "back")
    assert (tmp_path / "back" / WEIGHTS).read_bytes() == (tmp_path / "hub" / WEIGHTS).read_bytes()
