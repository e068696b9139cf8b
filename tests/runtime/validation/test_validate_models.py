"""Models that take more than text, or return something else than text, are proven on inputs made for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

from plans.errors import UsageError
from plans.mesh import Mesh, Mode
from runtime import run_on_ranks
from tests.runtime.checks import wrong_entry_cases
from tests.runtime.parallel.test_parity import skip_if_broken_unsharded
from tests.runtime.validation import validation_cases
from tests.tiny_multimodal import multimodal_model

FSDP, TP = Mesh(fsdp=2), Mesh(tp=2)
CASES = (
    pytest.param("t5", "tp", FSDP, id="an encoder-decoder"),
    pytest.param("whisper", "tp", FSDP, id="sounds to text"),
    pytest.param("qwen3_vl_moe", "tp", TP, id="images as patches of a grid, and experts"),
    pytest.param("qwen3_vl_moe", "ep", Mesh(tp=2, ep=2), marks=pytest.mark.full, id="images, and experts apart"),
    pytest.param("gemma4", "tp", TP, id="images as patches with places, and shared keys and values"),
    pytest.param("gemma4", "tp", FSDP, marks=pytest.mark.full, id="the same under FSDP"),
    pytest.param("gemma3", "tp", TP, marks=pytest.mark.full, id="square images"),
    pytest.param("mistral3", "tp", TP, marks=pytest.mark.full, id="square images with their sizes"),
    pytest.param("bert_classifier", "tp", FSDP, marks=pytest.mark.full, id="a classifier of segments of text"),
    pytest.param("llama_classifier", "tp", TP, marks=pytest.mark.full, id="a classifier of text"),
    pytest.param("qwen3_moe_base", "tp", TP, marks=pytest.mark.full, id="a base model"),
    pytest.param("vit_classifier", "tp", FSDP, id="a classifier of images"),
)
CANNOT_GENERATE = ("bert_classifier", "llama_classifier", "qwen3_moe_base", "vit_classifier")

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

Folder = Callable[[str], Path]


@pytest.fixture(scope="module")
def multimodal_folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """Return a function from a model's name to the folder that its save_pretrained wrote."""

    def save(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name) / "hub"
        multimodal_model(name).save_pretrained(folder)
        return folder

    return save


@pytest.mark.parametrize(("name", "mode", "mesh"), CASES)
def test_a_model_is_proven_with_all_of_its_parameters(
    name: str, mode: Mode, mesh: Mesh, multimodal_folder: Folder
) -> None:
    found = validate(multimodal_folder(name), mesh, mode)
    assert found["verdict"] == "proven"
    assert found["unexercised"] == []
    assert found["skipped"].keys() == ({"generation"} if name in CANNOT_GENERATE else set())


def test_a_weight_of_the_images_in_another_checkpoint_shows_in_the_logits(
    multimodal_folder: Folder, tmp_path: Path
) -> None:
    model = multimodal_model("gemma4")
    model.model.vision_tower.patch_embedder.input_proj.weight.data.mul_(1.5)
    model.save_pretrained(tmp_path / "other")
    found = validate(tmp_path / "other", TP, "tp", multimodal_folder("gemma4"))
    assert [row["name"] for row in found["content"]["mismatches"]] == [
        "model.vision_tower.patch_embedder.input_proj.weight"
    ]
    assert not found["forward"]["ok"]


def test_llama_4_is_proven_with_images(tmp_path: Path) -> None:
    skip_if_broken_unsharded("llama4")
    wrong_entry_cases.composite("llama4").save_pretrained(tmp_path / "hub")
    assert validate(tmp_path / "hub", TP, "tp")["verdict"] == "proven"


def validate(folder: Path, mesh: Mesh, mode: Mode, reference: Path | None = None) -> Any:
    found = run_on_ranks(lambda: validation_cases.validate(folder, reference, mesh, mode), mesh, timeout=300)
    assert all(one["verdict"] == found[0]["verdict"] for one in found)
    return found[0]


def test_a_model_that_returns_neither_logits_nor_states_is_refused(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1, "image_size": 16, "patch_size": 4}
    transformers.Dinov2Backbone(transformers.Dinov2Config(**sizes)).save_pretrained(tmp_path / "hub")
    with pytest.raises(UsageError, match="Backbone returns neither logits nor a last hidden state") as refused:
        validate(tmp_path / "hub", FSDP, "tp")
    assert refused.value.hint == "validate runs models that return logits or a last hidden state"
