"""Quantized checkpoints: bytes moved as they are, every scale with its weight, and no block torn apart."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers
from safetensors.torch import load_file, save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

from plans.errors import ConversionError, IncompleteError, IndivisibleError, MigratorError, UsageError
from plans.mesh import Mesh
from plans.placement import Packed, Placement, Replicate, Shard
from runtime.checkpoint.files.file_names import WEIGHTS
from runtime.checkpoint.ranks.files import rank_file_name
from runtime.checkpoint.resharding.execute import execute_reshard
from runtime.checkpoint.resharding.output_files import ReshardTarget
from runtime.checkpoint.resharding.plan import plan_reshard
from runtime.models.config import read_config
from runtime.models.quantized import build_stored_model
from runtime.planning.plan import Plan
from runtime.planning.resolve import check_scale_blocks, find_scales, place_tensors
from tests.rank_files import assembled
from tests.tiny_models import DENSE, ODD_MODELS

HUB = ReshardTarget("hf")
FP8 = {"quant_method": "fp8", "weight_block_size": [16, 16], "activation_scheme": "dynamic"}
DEEPSEEK = DENSE | {
    "intermediate_size": 64,
    "moe_intermediate_size": 64,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
}
MODES = {
    "tp": ReshardTarget("ranks", Mesh(tp=2)),
    "tp and fsdp": ReshardTarget("ranks", Mesh(tp=2, fsdp=2)),
    "ep": ReshardTarget("ranks", Mesh(tp=4, ep=4), mode="ep"),
    "tp_ep": ReshardTarget("ranks", Mesh(tp=2, ep=4, fsdp=2), mode="tp_ep"),
    "dcp": ReshardTarget("dcp", Mesh(tp=2, fsdp=2)),
}


def hub_names(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return a tensor as DeepSeek-V3's checkpoints store it, experts one by one."""
    found = re.fullmatch(r"(.*\.experts)\.(gate_up|down)_proj(_scale_inv)?", name)
    if found is None:
        return {name: tensor}
    owner, projection, scale = found.groups()
    parts = tensor.chunk(2, 1) if projection == "gate_up" else (tensor,)
    return {
        f"{owner}.{expert}.{part}_proj.weight{scale or ''}": whole[expert].clone()
        for part, whole in zip(projection.split("_"), parts, strict=True)
        for expert in range(len(tensor))
    }


def random_like(tensor: torch.Tensor) -> torch.Tensor:
    """Return random values; of narrow dtypes any bytes but those that are no number."""
    if tensor.element_size() > 1:
        return torch.rand(tensor.shape).to(tensor.dtype)
    return torch.randint(0, 127, tensor.shape, dtype=torch.uint8).view(tensor.dtype)


def save_quantized(config: Any, folder: Path) -> Path:
    """Write a checkpoint of random values for a quantized config."""
    config.save_pretrained(folder)
    torch.manual_seed(0)
    state = build_stored_model(read_config(folder)).state_dict()
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        tensors |= hub_names(name, random_like(tensor))
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def deepseek(**settings: object) -> Any:
    config = transformers.DeepseekV3Config(**DEEPSEEK, dtype="bfloat16", architectures=["DeepseekV3ForCausalLM"])
    config.quantization_config = FP8 | settings
    return config


@pytest.fixture(scope="module")
def fp8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_quantized(deepseek(), tmp_path_factory.mktemp("fp8") / "hub")


def local(tensor: torch.Tensor, placement: Placement, size: int, rank: int) -> torch.Tensor:
    match placement:
        case Shard(dim):
            return tensor.chunk(size, dim)[rank]
        case Packed(dim, groups):
            return torch.cat([part.chunk(size, dim)[rank] for part in tensor.chunk(groups, dim)], dim)
        case Replicate():
            return tensor


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8) if tensor.ndim else tensor


def test_the_tensors_are_those_of_transformers_quantized_loading(
    fp8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without a GPU it would dequantize; what is loaded does not depend on one.
    monkeypatch.setattr(FineGrainedFP8HfQuantizer, "validate_environment", lambda *arguments, **named: None)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(fp8, dtype="auto").state_dict()
    execute_reshard(plan_reshard(fp8, target=MODES["tp"]), tmp_path / "ranks")
    found = assembled(tmp_path / "ranks")
    assert found.keys() == loaded.keys()
    assert sum(name.endswith("_scale_inv") for name in found) > 20
    for name, tensor in found.items():
        # It keeps some biases in float32, whatever they are stored in.
        assert tensor.dtype in (loaded[name].dtype, torch.bfloat16)
        assert torch.equal(bits(tensor.to(loaded[name].dtype)), bits(loaded[name])), name


@pytest.mark.parametrize("mode", MODES)
def test_the_way_there_and_back_keeps_every_byte(mode: str, fp8: Path, tmp_path: Path) -> None:
    execute_reshard(plan_reshard(fp8, target=MODES[mode]), tmp_path / "ranks")
    execute_reshard(plan_reshard(tmp_path / "ranks", target=HUB), tmp_path / "hub")
    for file in fp8.iterdir():
        assert file.read_bytes() == (tmp_path / "hub" / file.name).read_bytes(), file.name


@pytest.mark.parametrize("mode", ["tp", "ep"])
def test_what_a_rank_holds_is_its_part_of_the_dequantized_weight(mode: str, fp8: Path, tmp_path: Path) -> None:
    manifest = execute_reshard(plan_reshard(fp8, target=MODES[mode]), tmp_path / "ranks").manifest
    assert manifest is not None
    dequantize = Fp8Dequantize(None)._dequantize_one
    whole = assembled(tmp_path / "ranks")
    pairs = [(name.removesuffix("_scale_inv"), name) for name in whole if name.endswith("_scale_inv")]
    axis = manifest.mesh.sizes("experts" if mode == "ep" else "dense")[1]
    cut = 0
    for rank in range(axis):
        held = load_file(tmp_path / "ranks" / rank_file_name(rank, axis))
        for weight, scale in pairs:
            if any(size % 16 for size in whole[weight].shape[-2:]):
                continue  # transformers' operation takes whole blocks only
            placement = manifest.tensors[weight].placements[-1]
            assert manifest.tensors[scale].placements[-1] == placement
            cut += placement != Replicate()
            expected = local(dequantize(whole[weight], whole[scale]), placement, axis, rank)
            assert torch.equal(dequantize(held[weight], held[scale]), expected), weight
    assert cut > 10


def test_fused_experts_and_back_to_separate_ones(fp8: Path, tmp_path: Path) -> None:
    execute_reshard(plan_reshard(fp8, target=ReshardTarget("hf", experts="fused")), tmp_path / "fused")
    fused = load_file(tmp_path / "fused" / WEIGHTS)
    assert fused["model.layers.1.mlp.experts.gate_up_proj_scale_inv"].shape == (8, 8, 2)
    execute_reshard(
        plan_reshard(tmp_path / "fused", target=ReshardTarget("hf", experts="separate")), tmp_path / "separate"
    )
    found, expected = load_file(tmp_path / "separate" / WEIGHTS), load_file(fp8 / WEIGHTS)
    assert found.keys() == expected.keys()
    assert all(torch.equal(bits(found[name]), bits(expected[name])) for name in found)


@pytest.mark.parametrize(("block", "works"), [([32, 32], "1, 2"), ([64, 64], "1"), ([16, 64], "1")])
def test_sizes_that_would_cut_a_block_are_refused(block: list[int], works: str, tmp_path: Path) -> None:
    source = save_quantized(deepseek(weight_block_size=block), tmp_path / "hub")
    for size in (2, 4):
        if str(size) in works:
            plan_reshard(source, Mesh(tp=size))
            continue
        with pytest.raises(IndivisibleError, match=rf"tp={size} would cut .* within blocks of ") as caught:
            plan_reshard(source, Mesh(tp=size))
        assert caught.value.hint == f"sizes that work: {works}"
    plan_reshard(source, target=MODES["ep"])


def test_scales_of_whole_tensors_stay_whole(tmp_path: Path) -> None:
    source = save_quantized(deepseek(weight_block_size=None, activation_scheme="static"), tmp_path / "hub")
    manifest = plan_reshard(source, Mesh(tp=2)).output.manifest
    assert manifest is not None
    scales = {name: entry for name, entry in manifest.tensors.items() if name.endswith(("scale_inv", "_scale"))}
    assert len(scales) > 20
    assert all(entry.placements[-1] == Replicate() for entry in scales.values())
    by_expert = plan_reshard(source, target=MODES["ep"]).output.manifest
    assert by_expert is not None
    experts = [entry for name, entry in by_expert.tensors.items() if name in scales and ".experts." in name]
    assert experts
    assert all(entry.placements[-1] == Shard(0) for entry in experts)


def gpt_oss(folder: Path) -> Path:
    config = transformers.GptOssConfig(
        **ODD_MODELS["gpt_oss"][1] | {"hidden_size": 64, "intermediate_size": 96},
        dtype="bfloat16",
        architectures=["GptOssForCausalLM"],
    )
    config.quantization_config = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    return save_quantized(config, folder)


def test_blocks_and_scales_of_mxfp4_go_with_their_experts(tmp_path: Path) -> None:
    source = gpt_oss(tmp_path / "hub")
    execute_reshard(plan_reshard(source, target=MODES["ep"]), tmp_path / "ranks")
    stored, experts = load_file(source / WEIGHTS), "model.layers.0.mlp.experts.down_proj"
    expected = convert_moe_packed_tensors(stored[f"{experts}_blocks"], stored[f"{experts}_scales"])
    assert expected.shape == (8, 96, 64)
    for rank in range(4):
        held = load_file(tmp_path / "ranks" / rank_file_name(rank, 4))
        found = convert_moe_packed_tensors(held[f"{experts}_blocks"], held[f"{experts}_scales"])
        assert torch.equal(found, expected.chunk(4)[rank])
        assert len(held[f"{experts}_bias"]) == 2
    execute_reshard(plan_reshard(tmp_path / "ranks", target=HUB), tmp_path / "back")
    assert (tmp_path / "back" / WEIGHTS).read_bytes() == (source / WEIGHTS).read_bytes()


_ORIGINAL = "use the checkpoint that it was quantized from"


@pytest.mark.parametrize(
    ("settings", "described", "step"),
    [
        ({"quant_method": "gptq", "bits": 4}, "'gptq' (GPTQ weights)", _ORIGINAL),
        ({"quant_method": "awq", "bits": 4}, "'awq' (AWQ weights)", _ORIGINAL),
        ({"quant_method": "bitsandbytes"}, "'bitsandbytes' (bitsandbytes weights)", "load it with transformers, call"),
        (
            {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"},
            "'compressed-tensors' (compressed-tensors weights, nvfp4-pack-quantized)",
            "load it with `quantization_config=CompressedTensorsConfig(run_compressed=False)`",
        ),
        (
            {"quant_method": "modelopt", "quant_algo": "NVFP4"},
            "'modelopt' (NVFP4 weights of ModelOpt, NVFP4)",
            _ORIGINAL,
        ),
        ({"quant_method": "torchao"}, "'torchao' (quantized weights)", _ORIGINAL),
        ({"quant_method": "nobody's"}, '"nobody\'s"', _ORIGINAL),
        ({"group_size": 64, "bits": 4}, "that quant_method does not name (quantized weights of MLX)", "dequantize it"),
    ],
)
def test_other_methods_are_refused_by_name(settings: dict[str, object], described: str, step: str) -> None:
    config = deepseek()
    config.quantization_config = settings
    message = re.escape(f"config.json: the quantization method {described} is not supported")
    with pytest.raises(UsageError, match=message) as caught:
        build_stored_model(config)
    assert caught.value.hint.startswith(step)
    assert caught.value.hint.endswith("; fp8 and mxfp4 are supported")


def test_methods_that_are_said_to_have_no_way_back_have_none() -> None:
    """transformers itself refuses to dequantize them."""
    from transformers.quantizers import HfQuantizer, auto

    for method in ("gptq", "awq"):
        quantizer = auto.AUTO_QUANTIZER_MAPPING[method]
        assert quantizer._dequantize is HfQuantizer._dequantize
    assert auto.AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"]._dequantize is not HfQuantizer._dequantize


def test_every_method_of_transformers_has_a_row() -> None:
    from transformers.utils.quantization_config import QuantizationMethod

    from runtime.formats import find_method

    unknown = [method.value for method in QuantizationMethod if find_method({"quant_method": method.value}) is None]
    assert sorted(unknown) == ["fp8", "mxfp4"]


@pytest.mark.parametrize("settings", [3, "fp8", ["fp8"], {"load_in_8bit": True}, {"quant_method": None}])
def test_settings_that_are_none_are_refused(settings: object) -> None:
    config = transformers.LlamaConfig(**DENSE, architectures=["LlamaForCausalLM"])
    config.quantization_config = settings
    with pytest.raises(UsageError, match=r"the quantization method .* is not supported"):
        build_stored_model(config)


@pytest.mark.parametrize("settings", [{"weight_block_size": [0, 16]}, {"activation_scheme": "no"}, {"scale_fmt": "x"}])
def test_settings_that_transformers_refuses_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(MigratorError, match="quantization_config: "):
        build_stored_model(deepseek(**settings))


def test_what_the_config_and_the_tensors_say_must_agree(fp8: Path, tmp_path: Path) -> None:
    weight = "model.layers.0.mlp.up_proj.weight"
    tensors = load_file(fp8 / WEIGHTS)
    changed = {
        f"{weight}' is stored as BF16, but F8_E4M3 in the model that config.json describes": tensors
        | {weight: tensors[weight].to(torch.bfloat16)},
        "none of the stored tensors is quantized": {
            name: tensor.to(torch.bfloat16) for name, tensor in tensors.items() if not name.endswith("_scale_inv")
        },
        "lm_head.weight_scale_inv' scales 'lm_head.weight', which": tensors
        | {"lm_head.weight_scale_inv": torch.ones(7, 2)},
    }
    for number, (message, stored) in enumerate(changed.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "config.json").write_text((fp8 / "config.json").read_text())
        save_file(stored, folder / WEIGHTS, metadata={"format": "pt"})
        with pytest.raises(UsageError, match=re.escape(message)) as caught:
            plan_reshard(folder, Mesh(tp=2))
        unquantized = "take the quantization_config out of config.json if these are the unquantized weights"
        other = "use the checkpoint that it was quantized from, or the config.json that was saved with these weights"
        assert caught.value.hint == (unquantized if message.startswith("none of") else other)


def test_layers_that_are_carried_keep_their_scales(fp8: Path, tmp_path: Path) -> None:
    source = tmp_path / "hub"
    source.mkdir()
    tensors = load_file(fp8 / WEIGHTS)
    extra = {name.replace("layers.2", "layers.3"): t.clone() for name, t in tensors.items() if "layers.2." in name}
    save_file(tensors | extra, source / WEIGHTS, metadata={"format": "pt"})
    (source / "config.json").write_text((fp8 / "config.json").read_text())
    manifest = execute_reshard(plan_reshard(source, target=MODES["tp_ep"]), tmp_path / "ranks").manifest
    assert manifest is not None
    assert {name for name, entry in manifest.tensors.items() if entry.kind == "carried"} == extra.keys()
    assert json.loads((tmp_path / "ranks" / "config.json").read_text())["quantization_config"]["quant_method"] == "fp8"
    execute_reshard(plan_reshard(tmp_path / "ranks", target=HUB), tmp_path / "back")
    assert (tmp_path / "back" / WEIGHTS).read_bytes() == (source / WEIGHTS).read_bytes()


def fused_fp8(folder: Path, intermediate: int, block: int, scale_format: str) -> dict[str, torch.Tensor]:
    """Write the config of a tiny fp8 model with experts of this size; return its tensors, with random values."""
    config = deepseek(weight_block_size=[block, block], scale_fmt=scale_format)
    config.moe_intermediate_size, config.n_routed_experts, config.num_hidden_layers = intermediate, 4, 2
    config.save_pretrained(folder)
    torch.manual_seed(0)
    state = build_stored_model(read_config(folder)).state_dict()
    return {name: random_like(tensor) for name, tensor in state.items()}


def separate_with_own_scales(tensors: dict[str, torch.Tensor], block: int) -> dict[str, torch.Tensor]:
    """Return experts quantized one by one: gate and up each have scales for all of their blocks."""
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        weight = tensors.get(name.removesuffix("_scale_inv"))
        if name.endswith("gate_up_proj_scale_inv") and weight is not None:
            rows = -(-weight.shape[1] // 2 // block)
            tensor = random_like(tensor.new_empty((len(tensor), 2 * rows, tensor.shape[2])))
        stored |= hub_names(name, tensor)
    return {name: tensor.contiguous().clone() for name, tensor in stored.items()}


SCALE_FORMATS = {"float": torch.float32, "ue8m0": torch.float8_e8m0fnu}
GATE_UP = "model.layers.1.mlp.experts.gate_up_proj"


@pytest.mark.parametrize("scale_format", SCALE_FORMATS)
@pytest.mark.parametrize(
    ("intermediate", "block", "rows"),
    [(6, 4, 3), (192, 128, 3), (7, 4, 4), (96, 128, 2)],  # of the last two, the fused form has as many scales
    ids=str,
)
def test_fused_experts_are_not_separated_within_a_block(
    intermediate: int, block: int, rows: int, scale_format: str, tmp_path: Path
) -> None:
    source = tmp_path / "dcp"
    tensors = fused_fp8(source, intermediate, block, scale_format)
    assert tensors[f"{GATE_UP}_scale_inv"].shape[1] == rows
    assert tensors[f"{GATE_UP}_scale_inv"].dtype == SCALE_FORMATS[scale_format]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*in a single process", category=UserWarning)
        dcp.save(dict(tensors), checkpoint_id=source, no_dist=True)
    message = (
        f"{GATE_UP}, [4, {2 * intermediate}, 32], has one scale for every {block} along dim 1 but is made of parts, "
        f"and one begins at {intermediate}, within such a block: {GATE_UP}_scale_inv is "
        f"{list(tensors[f'{GATE_UP}_scale_inv'].shape)}, "
    )
    for experts in (None, "separate"):
        with pytest.raises(ConversionError, match=re.escape(message)) as caught:
            plan_reshard(source, target=ReshardTarget("hf", experts=experts))
        assert caught.value.hint.startswith("set `experts=fused` to store the")
    # What the hint says works, and so does expert parallelism, which cuts no block.
    execute_reshard(plan_reshard(source, target=ReshardTarget("hf", experts="fused")), tmp_path / "fused")
    fused = load_file(tmp_path / "fused" / WEIGHTS)
    by_expert = ReshardTarget("ranks", Mesh(tp=2, ep=2), mode="ep")
    execute_reshard(plan_reshard(tmp_path / "fused", target=by_expert), tmp_path / "ranks")
    held = [load_file(tmp_path / "ranks" / rank_file_name(rank, 2)) for rank in range(2)]
    for name in (GATE_UP, f"{GATE_UP}_scale_inv"):
        assert torch.equal(bits(fused[name]), bits(tensors[name]))
        assert torch.equal(bits(torch.cat([rank[name] for rank in held])), bits(tensors[name]))
    execute_reshard(plan_reshard(tmp_path / "ranks", target=HUB), tmp_path / "back")
    assert (tmp_path / "back" / WEIGHTS).read_bytes() == (tmp_path / "fused" / WEIGHTS).read_bytes()


@pytest.mark.parametrize("scale_format", SCALE_FORMATS)
@pytest.mark.parametrize(("intermediate", "block"), [(6, 4), (192, 128), (7, 4), (96, 128)])
def test_separate_experts_are_not_joined_within_a_block(
    intermediate: int, block: int, scale_format: str, tmp_path: Path
) -> None:
    source = tmp_path / "hub"
    tensors = separate_with_own_scales(fused_fp8(source, intermediate, block, scale_format), block)
    save_file(tensors, source / WEIGHTS, metadata={"format": "pt"})
    for target in (HUB, ReshardTarget("dcp", Mesh(tp=2, ep=2), mode="ep")):
        with pytest.raises(ConversionError, match=f"one begins at {intermediate}, within such a block") as caught:
            plan_reshard(source, target=target)
        assert caught.value.hint.startswith("use a checkpoint that stores the experts fused")
        assert caught.value.data["cut"] == intermediate


@pytest.mark.parametrize(("intermediate", "block"), [(64, 128), (8, 4)])
def test_experts_whose_halves_have_scales_of_their_own_are_converted(
    intermediate: int, block: int, tmp_path: Path
) -> None:
    """A matrix of fewer rows than a block still has a scale for each half."""
    source = tmp_path / "hub"
    tensors = separate_with_own_scales(fused_fp8(source, intermediate, block, "float"), block)
    save_file(tensors, source / WEIGHTS, metadata={"format": "pt"})
    execute_reshard(plan_reshard(source, target=ReshardTarget("hf", experts="fused")), tmp_path / "fused")
    fused = load_file(tmp_path / "fused" / WEIGHTS)
    dequantize = Fp8Dequantize(None)._dequantize_one
    prefix = "model.layers.1.mlp.experts"
    found = dequantize(fused[GATE_UP], fused[f"{GATE_UP}_scale_inv"])
    for expert in range(4):
        halves = [f"{prefix}.{expert}.{part}_proj.weight" for part in ("gate", "up")]
        expected = torch.cat([dequantize(tensors[name], tensors[f"{name}_scale_inv"]) for name in halves])
        assert torch.equal(found[expert], expected)


@pytest.mark.parametrize("projection", ["gate_up_proj", "down_proj"])
def test_tensor_parallelism_cuts_no_block_of_the_intermediate_dim(projection: str, tmp_path: Path) -> None:
    """Of 12 elements in blocks of 8, two ranks would get 6 each; the other projection is left unsharded."""
    source = tmp_path / "hub"
    save_file(fused_fp8(source, 12, 8, "float"), source / WEIGHTS, metadata={"format": "pt"})
    model = build_stored_model(read_config(source))
    style = {"gate_up_proj": "moe_tp_gate_up_colwise", "down_proj": "moe_tp_down_rowwise"}[projection]
    parameters = place_tensors(model, Plan("tp", {f"model.layers.*.mlp.experts.{projection}": style}))
    with pytest.raises(IndivisibleError, match=rf"tp=2 would cut .*{projection}, .* within blocks of") as caught:
        check_scale_blocks(Mesh(tp=2), parameters, find_scales(model))
    assert caught.value.hint == "sizes that work: 1"


@pytest.mark.parametrize("intermediate", [6, 8])
def test_scales_of_blocks_under_another_name_are_never_left_apart(intermediate: int, tmp_path: Path) -> None:
    """Names in `_scale` are those of whole tensors; with blocks, the model's own scales count as missing."""
    source = tmp_path / "hub"
    tensors = fused_fp8(source, intermediate, 4, "float")
    renamed = {name.replace("_scale_inv", "_scale"): tensor for name, tensor in tensors.items()}
    save_file(renamed, source / WEIGHTS, metadata={"format": "pt"})
    for target in (ReshardTarget("hf", experts="separate"), ReshardTarget("hf", experts="fused"), MODES["ep"]):
        with pytest.raises(
            IncompleteError, match=r"q_a_proj\.weight_scale_inv'.* are not stored; stored are '"
        ) as caught:
            plan_reshard(source, target=target)
        assert caught.value.hint == "the checkpoint is incomplete, or config.json belongs to another model"
    save_file(tensors, source / WEIGHTS, metadata={"format": "pt"})
    assert plan_reshard(source, target=MODES["ep"])
