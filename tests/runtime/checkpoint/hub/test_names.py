"""Hub names to parameters on real models, where conversions transpose, are unknown or meet odd names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import core_model_loading

from plans.errors import ConversionError, HeaderError, IncompleteError, MismatchError
from plans.mesh import Mesh
from runtime.checkpoint.hub import conversion
from runtime.checkpoint.hub.conversion import convert
from runtime.checkpoint.resharding.execute import execute_reshard
from runtime.checkpoint.resharding.output_files import ReshardTarget
from runtime.checkpoint.resharding.plan import plan_reshard
from runtime.models.model import meta_model
from tests.rank_files import assembled

_TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "vocab_size": 131,
    "rope_parameters": {"rope_type": "default", "mrope_section": [4, 2, 2], "rope_theta": 10000.0},
}
_VISION = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "out_hidden_size": 64,
    "deepstack_visual_indexes": [0],
    "num_position_embeddings": 16,
}


def shapes_of(model: transformers.PreTrainedModel) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def qwen3_moe() -> transformers.PreTrainedModel:
    config = transformers.Qwen3MoeConfig(**{k: v for k, v in _TEXT.items() if k != "rope_parameters"})
    config.architectures = ["Qwen3MoeForCausalLM"]
    return meta_model(config)


def qwen3_moe_hub(model: transformers.PreTrainedModel) -> dict[str, tuple[int, ...]]:
    stored = {name: shape for name, shape in shapes_of(model).items() if ".experts." not in name}
    for expert in range(4):
        prefix = f"model.layers.0.mlp.experts.{expert}"
        stored |= {f"{prefix}.{name}_proj.weight": (32, 64) for name in ("gate", "up")}
        stored[f"{prefix}.down_proj.weight"] = (64, 32)
    return stored


@pytest.mark.parametrize("transposed", [True, False])
def test_a_converter_that_transposes_by_shape(transposed: bool, tmp_path: Path) -> None:
    # Not square, which transformers would leave as it is, whatever lies beside it.
    config = transformers.Qwen3VLMoeConfig(text_config=_TEXT | {"moe_intermediate_size": 24}, vision_config=_VISION)
    model = transformers.Qwen3VLMoeForConditionalGeneration(config)
    model.save_pretrained(tmp_path / "hub")
    file = tmp_path / "hub" / "model.safetensors"
    tensors = load_file(file)
    experts = [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]
    assert len(experts) == 2
    if transposed:
        tensors |= {name: tensors[name].transpose(1, 2).contiguous() for name in experts}
        save_file(tensors, file, metadata={"format": "pt"})
    loaded = transformers.Qwen3VLMoeForConditionalGeneration.from_pretrained(tmp_path / "hub").state_dict()
    manifest = execute_reshard(plan_reshard(tmp_path / "hub", Mesh(tp=2)), tmp_path / "ranks").manifest
    found = assembled(tmp_path / "ranks")
    assert found.keys() | manifest.tied.keys() == loaded.keys()
    assert all(torch.equal(found[name], loaded[name]) for name in found)
    execute_reshard(plan_reshard(tmp_path / "ranks", target=ReshardTarget("hf")), tmp_path / "back")
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == file.read_bytes()


def test_an_unknown_operation_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    model = qwen3_moe()

    class Scramble(core_model_loading.Concatenate):
        pass

    converter = core_model_loading.WeightConverter(["experts.*.down_proj.weight"], ["experts.down_proj"], [Scramble(0)])
    monkeypatch.setattr(conversion, "get_model_conversion_mapping", lambda model, **named: [converter])
    stored = {name: shape for name, shape in qwen3_moe_hub(model).items() if "down_proj" in name}
    with pytest.raises(ConversionError, match="Scramble") as caught:
        convert(model, stored, {}, {})
    assert "model.layers.0.mlp.experts.0.down_proj.weight" in caught.value.data["tensors"]


def test_a_class_of_another_module_is_not_the_known_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    model = qwen3_moe()
    impostor = type("Concatenate", (core_model_loading.Concatenate,), {"__module__": "elsewhere"})
    converter = core_model_loading.WeightConverter(["experts.*.down_proj.weight"], ["experts.down_proj"], [impostor(0)])
    monkeypatch.setattr(conversion, "get_model_conversion_mapping", lambda model, **named: [converter])
    stored = {name: shape for name, shape in qwen3_moe_hub(model).items() if "down_proj" in name}
    with pytest.raises(ConversionError, match="need the unknown operation"):
        convert(model, stored, {}, {})


def test_what_is_no_permutation_of_elements_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    model = qwen3_moe()
    converter = core_model_loading.WeightConverter(["weight$", "weight_scale_inv"], ["weight"], [Fp8Dequantize(None)])
    monkeypatch.setattr(conversion, "get_model_conversion_mapping", lambda model, **named: [converter])
    with pytest.raises(ConversionError, match="need the unknown operation Fp8Dequantize"):
        convert(model, {"model.layers.0.self_attn.q_proj.weight": (64, 64)}, {}, {})


def test_every_tensor_that_is_too_short_is_named() -> None:
    model = qwen3_moe()
    stored = qwen3_moe_hub(model)
    short = ["model.embed_tokens.weight", "model.norm.weight", "model.layers.0.self_attn.o_proj.weight"]
    stored |= {name: (stored[name][0] // 2, *stored[name][1:]) for name in short}
    stored |= {name: (16, 64) for name in stored if "up_proj" in name or "gate_proj" in name}
    with pytest.raises(MismatchError) as caught:
        convert(model, stored, shapes_of(model), {})
    fused = "model.layers.0.mlp.experts.gate_up_proj"
    assert set(caught.value.data["names"]) == {*short, fused}
    assert caught.value.data["expected"][fused] == [4, 64, 64]
    assert caught.value.data["found"][fused] == [4, 32, 64]
    assert "model.embed_tokens.weight is [131, 64] in the model, but 'model.embed_tokens.weight' give [65, 64]" in str(
        caught.value
    )
    assert str(caught.value).endswith("; and 1 more")
    assert caught.value.hint == "config.json does not belong to these weights, or some are missing"


def test_the_base_models_names_are_taken_too() -> None:
    model = qwen3_moe()
    stored = {name.removeprefix("model."): shape for name, shape in qwen3_moe_hub(model).items()}
    converted = convert(model, stored, shapes_of(model), {})
    assert converted.passthrough == ()
    sources = converted.tensor_maps["model.layers.0.mlp.experts.down_proj"].sources
    assert sources == tuple(f"layers.0.mlp.experts.{expert}.down_proj.weight" for expert in range(4))


def test_experts_are_taken_in_the_order_of_their_numbers() -> None:
    config = transformers.Qwen3MoeConfig(
        **{k: v for k, v in _TEXT.items() if k != "rope_parameters"} | {"num_experts": 12}
    )
    config.architectures = ["Qwen3MoeForCausalLM"]
    model = meta_model(config)
    stored = qwen3_moe_hub(model)
    for expert in range(4, 12):
        for name in ("gate", "up", "down"):
            first = stored[f"model.layers.0.mlp.experts.0.{name}_proj.weight"]
            stored[f"model.layers.0.mlp.experts.{expert}.{name}_proj.weight"] = first
    forms = convert(model, dict(sorted(stored.items())), shapes_of(model), {}).tensor_maps
    sources = forms["model.layers.0.mlp.experts.gate_up_proj"].sources
    experts = [f"model.layers.0.mlp.experts.{e}.{n}_proj.weight" for n in ("gate", "up") for e in range(12)]
    assert list(sources) == experts


def test_a_gap_in_a_series_is_never_closed() -> None:
    model = qwen3_moe()
    stored = qwen3_moe_hub(model)
    for name in ("gate", "up", "down"):
        moved = stored.pop(f"model.layers.0.mlp.experts.1.{name}_proj.weight")
        stored[f"model.layers.0.mlp.experts.4.{name}_proj.weight"] = moved
    with pytest.raises(
        IncompleteError,
        match=r"(?s)1\.down_proj\.weight is missing.*hint: the checkpoint is incomplete; download or save it again",
    ):
        convert(model, stored, shapes_of(model), {})


def test_two_names_of_one_parameter_are_refused() -> None:
    model = qwen3_moe()
    stored = qwen3_moe_hub(model) | {"norm.weight": (64,)}
    with pytest.raises(
        ConversionError, match=r"(?s)stored more than once.*hint: the checkpoint stores a tensor in two forms"
    ):
        convert(model, stored, shapes_of(model), {})


@pytest.mark.parametrize("digits", ["\u00b2", "9" * 5000])
def test_digits_that_are_no_number_are_refused(digits: str) -> None:
    model = qwen3_moe()
    with pytest.raises(
        HeaderError, match=r"(?s)cannot be ordered.*hint: the checkpoint was not written by transformers"
    ):
        convert(model, qwen3_moe_hub(model) | {f"layers.{digits}.x": (1,)}, shapes_of(model), {})


def test_what_a_converter_makes_for_nobody_is_carried_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model = qwen3_moe()
    stored = qwen3_moe_hub(model)
    query, key = (stored.pop(f"model.layers.0.self_attn.{name}_proj.weight") for name in ("q", "k"))
    assert query == (64, 64)
    fused = "model.layers.0.self_attn.fused.weight"
    stored[fused] = (3 * 64, 64)
    converter = core_model_loading.WeightConverter(
        ["self_attn.fused.weight"],
        [f"self_attn.{name}_proj.weight" for name in ("q", "nobody", "nothing")],
        [core_model_loading.Chunk(0)],
    )
    known = conversion.get_model_conversion_mapping(model)
    monkeypatch.setattr(conversion, "get_model_conversion_mapping", lambda model, **named: [*known, converter])
    stored["model.layers.0.self_attn.k_proj.weight"] = key
    converted = convert(model, stored, shapes_of(model), {})
    assert converted.passthrough == (fused,)
    assert converted.tensor_maps["model.layers.0.self_attn.q_proj.weight"].sources == (fused,)


def test_layers_beyond_the_model_are_carried() -> None:
    model = qwen3_moe()
    extra = {
        name.replace("layers.0.", "layers.1."): shape
        for name, shape in qwen3_moe_hub(model).items()
        if "layers.0" in name
    }
    converted = convert(model, qwen3_moe_hub(model) | extra, shapes_of(model), {})
    assert set(converted.passthrough) == set(extra)
