"""Tensors that have the model's shape both as they are and transposed: those beside them tell which is stored."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import core_model_loading

from plans.errors import ConversionError
from plans.mesh import Mesh
from runtime.checkpoint.files.file_names import WEIGHTS
from runtime.checkpoint.hub import conversion
from runtime.checkpoint.hub.conversion import convert
from runtime.checkpoint.hub.operations import AmbiguousOrientationError, ConversionContext, transpose_dims
from runtime.checkpoint.resharding.execute import execute_reshard
from runtime.checkpoint.resharding.output_files import ReshardTarget
from runtime.checkpoint.resharding.plan import plan_reshard
from runtime.models.model import meta_model
from runtime.models.quantized import build_stored_model
from runtime.tensor_map.tensor_map import whole
from tests.rank_files import assembled
from tests.tiny_models import DENSE, tiny_model, with_noise

EXPERTS = "model.language_model.layers.0.mlp.experts"


def qwen3_vl_moe(hidden: int, intermediate: int, **quantization: Any) -> Any:
    text = {
        "hidden_size": hidden,
        "intermediate_size": 48,
        "moe_intermediate_size": intermediate,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "vocab_size": 67,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0},
    }
    vision = {
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "out_hidden_size": hidden,
        "deepstack_visual_indexes": [0],
        "num_position_embeddings": 16,
    }
    config = transformers.Qwen3VLMoeConfig(text_config=text, vision_config=vision)
    config.architectures = ["Qwen3VLMoeForConditionalGeneration"]
    if quantization:
        config.quantization_config = {"quant_method": "fp8", "activation_scheme": "dynamic", **quantization}
    return config


def save_experts(config: Any, state: Mapping[str, torch.Tensor], folder: Path, *, transposed: bool) -> Path:
    """Write a checkpoint of these tensors, its experts in one of the two orientations that transformers reads."""
    config.save_pretrained(folder)
    stored = {
        name: tensor.transpose(1, 2).contiguous() if transposed and ".experts." in name else tensor.clone()
        for name, tensor in state.items()
    }
    save_file(stored, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize(
    ("hidden", "intermediate", "square"),
    [(32, 16, "gate_up_proj"), (32, 32, "down_proj")],
    ids=["twice the intermediate size is hidden", "the intermediate size is hidden"],
)
def test_a_square_tensor_lies_as_the_one_beside_it(
    hidden: int, intermediate: int, square: str, transposed: bool, tmp_path: Path
) -> None:
    config = qwen3_vl_moe(hidden, intermediate)
    state = with_noise(transformers.Qwen3VLMoeForConditionalGeneration(config)).state_dict()
    assert state[f"{EXPERTS}.{square}"].shape == (2, 32, 32)
    source = save_experts(config, state, tmp_path / "hub", transposed=transposed)
    plan = plan_reshard(source, Mesh(tp=2))
    assert plan.checkpoint.reoriented == ((f"{EXPERTS}.{square}",) if transposed else ())
    execute_reshard(plan, tmp_path / "ranks")
    found = assembled(tmp_path / "ranks")
    assert all(torch.equal(tensor, state[name]) for name, tensor in found.items())
    execute_reshard(plan_reshard(tmp_path / "ranks", target=ReshardTarget("hf")), tmp_path / "back")
    assert (tmp_path / "back" / WEIGHTS).read_bytes() == (source / WEIGHTS).read_bytes()
    # Without the record of the stored form, experts are stored as the model has them, where transformers reads them.
    execute_reshard(plan_reshard(tmp_path / "ranks", target=ReshardTarget("hf", experts="separate")), tmp_path / "hf")
    loaded = transformers.Qwen3VLMoeForConditionalGeneration.from_pretrained(tmp_path / "hf").state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.items())


@pytest.mark.parametrize(("hidden", "intermediate"), [(32, 12), (32, 16), (64, 16)])
def test_weights_are_not_transposed_without_their_scales(hidden: int, intermediate: int, tmp_path: Path) -> None:
    """transformers transposes the weights alone; some of the scales then have the right shape by chance."""
    config = qwen3_vl_moe(hidden, intermediate, weight_block_size=[8, 8])
    model = build_stored_model(config)
    state = {name: torch.zeros(tensor.shape, dtype=tensor.dtype) for name, tensor in model.state_dict().items()}
    for transposed in (False, True):
        source = save_experts(config, state, tmp_path / str(transposed), transposed=transposed)
        if not transposed:
            plan_reshard(source, target=ReshardTarget("dcp", Mesh(tp=2, ep=2), mode="ep"))
            continue
        with pytest.raises(ConversionError, match=r"is stored transposed, but its scales .* are not") as caught:
            plan_reshard(source, Mesh())
        assert caught.value.data["scale"] == caught.value.data["tensor"] + "_scale_inv"


FAMILIES: Mapping[str, tuple[str, dict[str, object]]] = {
    "llama4_text": ("Llama4TextConfig", {"intermediate_size_mlp": 48, "num_local_experts": 2, "head_dim": 8}),
    "gpt_oss": ("GptOssConfig", {"num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 8}),
    "aria_text": ("AriaTextConfig", {"moe_num_experts": 2, "moe_topk": 1, "moe_num_shared_experts": 1}),
    "qwen3_moe": ("Qwen3MoeConfig", {"num_experts": 2, "num_experts_per_tok": 1, "head_dim": 8}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 2}),
    "glm4_moe": ("Glm4MoeConfig", {"n_routed_experts": 2, "num_experts_per_tok": 1, "first_k_dense_replace": 0}),
}


@pytest.mark.parametrize("intermediate", [16, 32])
@pytest.mark.parametrize("family", FAMILIES)
def test_square_experts_of_other_families_are_read_as_by_transformers(
    family: str, intermediate: int, tmp_path: Path
) -> None:
    name, sizes = FAMILIES[family]
    common = {"intermediate_size": intermediate, "moe_intermediate_size": intermediate, "num_hidden_layers": 1}
    config = getattr(transformers, name)(**DENSE | common | sizes)
    if family == "gpt_oss":
        config.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}
    model = tiny_model(config)
    model.save_pretrained(tmp_path / "hub")
    assert any(tensor.ndim == 3 and tensor.shape[1] == tensor.shape[2] for tensor in model.state_dict().values())
    execute_reshard(plan_reshard(tmp_path / "hub", Mesh()), tmp_path / "ranks")
    loaded = type(model).from_pretrained(tmp_path / "hub").state_dict()
    found = load_file(tmp_path / "ranks" / "rank-00000-of-00001.safetensors")
    assert found
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in found.items())


def test_what_no_tensor_tells_is_refused_with_both_readings(monkeypatch: pytest.MonkeyPatch) -> None:
    model = meta_model(transformers.LlamaConfig(**DENSE, architectures=["LlamaForCausalLM"]))
    operation = core_model_loading.Transpose(0, 1, check_dims=True)
    converter = core_model_loading.WeightConverter(["wq.weight"], ["q_proj.weight"], [operation])
    monkeypatch.setattr(conversion, "get_model_conversion_mapping", lambda model, **named: [converter])
    stored, name = "model.layers.0.self_attn.wq.weight", "model.layers.0.self_attn.q_proj.weight"
    message = r"\[32, 32\] is the model's shape both as stored and transposed, and no tensor beside it tells"
    with pytest.raises(ConversionError, match=message) as caught:
        convert(model, {stored: (32, 32)}, {name: (32, 32)}, {})
    assert caught.value.data["tensors"] == [stored]
    assert caught.value.hint == "save the model as a torch distributed checkpoint, with tensors as they are in it"


def test_tensors_that_contradict_each_other_tell_nothing() -> None:
    operation = core_model_loading.Transpose(0, 1, check_dims=True)
    shapes = {"experts.a": (2, 3), "experts.b": (3, 4), "experts.c": (4, 4)}
    orientations: set[bool] = set()

    def transpose(name: str, shape: tuple[int, int]) -> tuple[int, ...]:
        context = ConversionContext([name], [name], name, shapes, transformers.LlamaConfig(), orientations=orientations)
        return transpose_dims(operation, {name: [whole(name, shape)]}, context)[name][0].boxes[0].strides

    assert transpose("experts.a", (3, 2)) == (1, 2)
    assert transpose("experts.c", (4, 4)) == (1, 4)
    assert transpose("experts.b", (3, 4)) == (4, 1)
    with pytest.raises(AmbiguousOrientationError, match="tensors beside it contradict each other"):
        transpose("experts.c", (4, 4))
