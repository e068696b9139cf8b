"""Quantized checkpoints made to run: weights times their scales, as transformers computes them.

The tensors are loaded as they are stored, a rank's part of each, and dequantized there. Plans keep every scale with
what it scales, so no rank needs another's.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from plans.errors import UsageError
from runtime.checkpoint.checkpoint import Checkpoint
from runtime.checkpoint.files.job_folders import find_config_folder
from runtime.checkpoint.open import open_checkpoint
from runtime.loader.loading import load
from runtime.loader.memory import ModelMemory
from runtime.loader.non_persistent import CASTABLE_DTYPES, rebuild_non_persistent
from runtime.loader.parameter_refs import find_parameter_refs
from runtime.models.config import find_quantization, read_config
from runtime.models.quantized import build_stored_model
from runtime.planning.resolve import Scale, find_scales

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["dequantize", "find_cut_weight", "find_quantization_method", "load_dequantized", "stored_model"]

# The values of four bits, a sign and e2m1.
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_EXPONENT_BIAS = 127


def find_quantization_method(folder: Path) -> str:
    """Return the quantization method of a checkpoint, empty if its weights are not quantized."""
    found = find_quantization(read_config(find_config_folder(folder)))
    return "" if found is None else str(found[1].get("quant_method"))


def stored_model(folder: Path) -> PreTrainedModel:
    """Build a folder's model on meta with the tensors that it stores; they have no gradients."""
    model = build_stored_model(read_config(find_config_folder(folder)))
    model.requires_grad_(False)
    return model


def find_cut_weight(folder: Path) -> str | None:
    """Return a weight whose last block is cut short, if there is one; transformers dequantizes whole blocks only."""
    model = stored_model(folder)
    parameters = dict(model.named_parameters())  # without packed weights, whose blocks are never cut
    for scale in find_scales(model).values():
        if scale.block is None or scale.weight not in parameters:
            continue
        sizes = parameters[scale.weight].shape
        if any(size % width for size, width in zip(sizes, scale.block, strict=True)):
            return scale.weight
    return None


def load_dequantized(
    model: PreTrainedModel,
    checkpoint: Path | Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    stored: PreTrainedModel | None = None,
) -> None:
    """Load a quantized checkpoint into a model that computes with its dequantized weights. Collective over its ranks.

    Args:
        model: the unquantized model on meta, sharded by a plan or not.
        checkpoint: the checkpoint.
        dtype: the dtype of the weights.
        device: the device that they are computed on.
        stored: the model with the tensors that are stored, on meta and sharded by the same plan; None if not sharded.

    Raises:
        MigratorError: the checkpoint cannot be read, or the memory does not suffice.
    """
    opened = checkpoint if isinstance(checkpoint, Checkpoint) else open_checkpoint(checkpoint).read_headers()
    stored = stored_model(opened.folder) if stored is None else stored
    load(stored, opened, device=device, every_copy=True, verify=False)  # the content check does that
    held = {name: ref.get_local() for name, ref in find_parameter_refs(stored).items()}
    with torch.no_grad():
        values = dequantize(held, find_scales(stored), dtype)
    refs = find_parameter_refs(model)
    for name, ref in refs.items():
        assert values[name].shape == ref.get_local().shape, f"{name}: {values[name].shape}"
    buffers = rebuild_non_persistent(model, refs, dtype).buffers
    ModelMemory(refs, {name: values[name] for name in refs}, device).install(model, buffers)


def dequantize(
    tensors: Mapping[str, torch.Tensor], scales: Mapping[str, Scale], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Return the weights that stored tensors stand for, and those that are not quantized, in a dtype.

    Args:
        tensors: the stored tensors by name, or a rank's part of each.
        scales: the scales among them, with the weights that they belong to.
        dtype: the dtype.

    Raises:
        UsageError: a weight is stored in a way that is not known.
    """
    values = {
        name: tensor.to(dtype) if tensor.dtype in CASTABLE_DTYPES else tensor
        for name, tensor in tensors.items()
        if name not in scales
    }
    for name, scale in scales.items():
        kind = name.rpartition("_")[2]
        if kind == "scales":
            blocks = tensors[name.removesuffix("scales") + "blocks"]
            values[scale.weight] = _dequantize_packed(blocks, tensors[name], dtype)
        elif kind == "inv":
            weight = tensors[scale.weight]
            values[scale.weight] = _dequantize_blocks(weight, tensors[name], scale.block).to(dtype)
    if unknown := [name for name, value in values.items() if value.is_floating_point() and value.dtype != dtype]:
        raise UsageError(
            f"{unknown[0]} has no scale to dequantize it with", hint="use the checkpoint that it was quantized from"
        )
    return values


def _dequantize_blocks(weight: torch.Tensor, scale: torch.Tensor, block: tuple[int, ...] | None) -> torch.Tensor:
    """Multiply a weight by the scales of its blocks, the last of which may be cut short."""
    factors = _read_exponents(scale) if scale.dtype == torch.uint8 else scale.float()
    width = 1
    if weight.dtype == torch.int8:
        weight, width = _unpack_fp4(weight.view(torch.uint8)), 2
    if block is None:
        return weight.float() * factors.reshape(*factors.shape, *[1] * (weight.ndim - factors.ndim))
    sizes = (*block[:-1], block[-1] * width)
    for dim in range(weight.ndim - 2, weight.ndim):
        factors = factors.repeat_interleave(sizes[dim], dim).narrow(dim, 0, weight.shape[dim])
    return weight.float() * factors


def _dequantize_packed(blocks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return stacked experts, [experts, in, out], from blocks of 16 bytes, [experts, out, blocks of the input, 16]."""
    values = _unpack_fp4(blocks).to(dtype) * _read_exponents(scales).to(dtype).unsqueeze(-1)
    return values.flatten(-2).transpose(1, 2).contiguous()


def _unpack_fp4(packed: torch.Tensor) -> torch.Tensor:
    """Return the two values of each byte, the low bits first, along the last dim."""
    table = torch.tensor(_FP4, device=packed.device)
    return torch.stack((table[(packed & 15).long()], table[(packed >> 4).long()]), dim=-1).flatten(-2)


def _read_exponents(scales: torch.Tensor) -> torch.Tensor:
    return (scales.double() - _EXPONENT_BIAS).exp2()
