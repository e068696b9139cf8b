"""Quantized checkpoints validated: their tensors as they are stored, their models with dequantized weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from plans.errors import UsageError
from plans.mesh import Mesh, Mode
from runtime import run_on_ranks
from runtime.checkpoint.files.file_names import WEIGHTS
from runtime.checkpoint.resharding.execute import execute_reshard
from runtime.checkpoint.resharding.output_files import ReshardTarget
from runtime.checkpoint.resharding.plan import plan_reshard
from runtime.models.config import read_config
from runtime.models.quantized import build_stored_model
from runtime.planning.resolve import find_scales
from runtime.validation.request import ValidationRequest
from runtime.validation.validate import validate as validate_checkpoint
from tests.runtime.checkpoint.hub.test_quantized import DEEPSEEK, FP8, gpt_oss, hub_names
from tests.runtime.validation.validation_cases import PARTS, validate

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

BLOCK = 16
LARGEST = 448.0


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a weight in fp8 with a scale for each block, as DeepSeek-V3 is stored."""
    sizes = weight.shape[-2:]
    padded = torch.nn.functional.pad(weight, (0, -sizes[1] % BLOCK, 0, -sizes[0] % BLOCK))
    blocks = padded.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK))
    scales = blocks.abs().amax((-3, -1)) / LARGEST
    scaled = blocks / scales[..., :, None, :, None]
    whole = scaled.flatten(-4, -3).flatten(-2)[..., : sizes[0], : sizes[1]]
    return whole.contiguous().to(torch.float8_e4m3fn), scales.float()


def save_fp8(folder: Path, **sizes: int) -> Path:
    """Write a tiny DeepSeek-V3 whose linear layers are stored in fp8."""
    config = transformers.DeepseekV3Config(
        **DEEPSEEK | sizes, dtype="bfloat16", architectures=["DeepseekV3ForCausalLM"]
    )
    config.quantization_config = FP8
    config.save_pretrained(folder)
    stored = build_stored_model(read_config(folder))
    scales = {scale.weight: name for name, scale in find_scales(stored).items()}
    torch.manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in stored.state_dict().items():
        if name in scales.values():
            continue
        value = 0.2 * torch.randn(tensor.shape) + (0 if tensor.ndim > 1 else 1)
        if name in scales:
            value, scale = quantize(value)
            tensors |= hub_names(scales[name], scale)
        tensors |= hub_names(name, value if name in scales else value.to(tensor.dtype))
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def fp8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_fp8(tmp_path_factory.mktemp("fp8") / "hub", q_lora_rank=32, kv_lora_rank=16)


@pytest.fixture(scope="module")
def mxfp4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny gpt-oss whose experts are stored in blocks of four bits, with scales around 2**-4."""
    folder = gpt_oss(tmp_path_factory.mktemp("mxfp4") / "hub")
    tensors = load_file(folder / WEIGHTS)
    torch.manual_seed(0)
    for name, tensor in tensors.items():
        if name.endswith("_blocks"):
            tensors[name] = torch.randint(0, 256, tensor.shape, dtype=torch.uint8)
        elif name.endswith("_scales"):
            tensors[name] = torch.randint(121, 125, tensor.shape, dtype=torch.uint8)
        else:
            tensors[name] = (0.2 * torch.randn(tensor.shape) + (tensor.ndim == 1)).to(tensor.dtype)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def run(folder: Path, mode: Mode, mesh: Mesh, reference: Path | None = None) -> dict[str, Any]:
    first, *others = run_on_ranks(lambda: validate(folder, reference, mesh, mode), mesh)
    assert all({**other, "seconds": {}} == {**first, "seconds": {}} for other in others)
    return first


def assert_proven(found: Mapping[str, Any], method: str, reading: str = "transformers") -> None:
    assert found["verdict"] == "proven", found
    assert {part for part in PARTS if found[part]["ok"]} >= {"structure", "content", "forward", "backward"}
    assert found["forward"]["precision"] == "float64"
    assert found["forward"]["dequantized_from"] == found["backward"]["dequantized_from"] == method
    assert found["forward"]["reference_read_by"].startswith(reading)
    assert found["skipped"]["forward as stored"] == f"the models computed with weights dequantized from {method}"


MESHES: list[tuple[Mode, Mesh]] = [
    ("tp", Mesh(tp=2)),
    ("tp", Mesh(tp=2, fsdp=2)),
    ("ep", Mesh(tp=4, ep=4)),
    ("tp_ep", Mesh(tp=2, ep=4, fsdp=2)),
]


@pytest.mark.parametrize(
    ("mode", "mesh"), [*(pytest.param(*row, marks=pytest.mark.full) for row in MESHES[:-1]), MESHES[-1]], ids=str
)
def test_fp8_is_validated_in_every_mode(mode: Mode, mesh: Mesh, fp8: Path) -> None:
    assert_proven(run(fp8, mode, mesh), "fp8")


@pytest.mark.parametrize(
    ("mode", "mesh"), [MESHES[1], *(pytest.param(*row, marks=pytest.mark.full) for row in MESHES[2:])], ids=str
)
def test_mxfp4_is_validated(mode: Mode, mesh: Mesh, mxfp4: Path) -> None:
    assert_proven(run(mxfp4, mode, mesh), "mxfp4")


def test_ranks_of_fp8_are_validated_and_their_reference_is_dequantized_by_migrator(fp8: Path, tmp_path: Path) -> None:
    execute_reshard(plan_reshard(fp8, target=ReshardTarget("ranks", Mesh(tp=2))), tmp_path / "ranks")
    found = run(tmp_path / "ranks", "tp", Mesh(tp=2))
    assert_proven(found, "fp8", "migrator alone, because transformers does not read the layout ranks")
    assert_proven(run(tmp_path / "ranks", "tp", Mesh(tp=2), fp8), "fp8")


def test_a_block_that_is_cut_short_is_dequantized_by_migrator_alone(tmp_path: Path) -> None:
    folder = save_fp8(tmp_path / "hub", q_lora_rank=24)
    weight = "model.layers.0.self_attn.q_a_proj.weight"
    reading = f"migrator alone, because transformers dequantizes whole blocks only, and the last one of {weight}"
    assert_proven(run(folder, "ep", Mesh(tp=2, ep=2)), "fp8", reading)


def test_a_changed_scale_is_found_in_what_is_stored_and_in_what_is_computed(fp8: Path, tmp_path: Path) -> None:
    execute_reshard(plan_reshard(fp8, target=ReshardTarget("hf")), tmp_path / "hub")
    tensors = load_file(tmp_path / "hub" / WEIGHTS)
    scale = "model.layers.0.self_attn.o_proj.weight_scale_inv"
    tensors[scale][0, 0] *= 2
    save_file(tensors, tmp_path / "hub" / WEIGHTS, metadata={"format": "pt"})
    found = run(tmp_path / "hub", "tp", Mesh(tp=2), fp8)
    assert found["verdict"] == "not proven"
    assert [row["name"] for row in found["content"]["mismatches"]] == [scale]
    assert not found["forward"]["ok"]


def test_quantized_models_are_not_compared_block_by_block(fp8: Path) -> None:
    request = ValidationRequest(fp8, Mesh(tp=2), "tp", by_block=True)
    with pytest.raises(UsageError, match="models of fp8 weights are not compared block by block") as caught:
        run_on_ranks(lambda: validate_checkpoint(request), 2)
    assert caught.value.hint == "leave `by_block` out, or validate the checkpoint that it was quantized from"
