"""What ranks hold of a model: their local tensors, the bytes of those, and their pieces of whole tensors."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from itertools import product
from math import prod
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from plans.mesh import Mesh
from plans.resolved_plan import ResolvedParameter, ResolvedPlan
from runtime.checkpoint.checkpoint import Checkpoint
from runtime.checkpoint.digest import Digest
from runtime.checkpoint.verifying.tensor_digest import digest_tensor
from runtime.inspecting.placement import place_by_plan
from runtime.models.model import model_tensors
from runtime.parallel.mismatch import Mismatch
from runtime.processes.agreement import all_gather_json
from runtime.styles.placements import cut_local_shard
from runtime.tensor_map.tensor_map import TensorMap, row_major, unravel

__all__ = ["check_memory", "compute_local_digest", "detach_local", "fits_in_memory", "free_memory", "slice_local_shard"]


def detach_local(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's local tensor, without its history."""
    with torch.no_grad():
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def slice_local_shard(tensor: torch.Tensor, row: ResolvedParameter, mesh: Mesh) -> torch.Tensor:
    """Return what this rank holds of a whole tensor: cut by the plan's entry first, then by FSDP."""
    axes = zip(row.placements, mesh.sizes(row.mesh), mesh.coordinates(row.mesh, dist.get_rank()), strict=True)
    for placement, size, index in reversed(list(axes)):
        tensor = cut_local_shard(tensor, placement, size, index)
    return tensor


def check_memory(
    model: nn.Module, resolved: ResolvedPlan, checkpoint: Checkpoint
) -> tuple[list[Mismatch], dict[str, object]]:
    """Compare the bytes that each rank holds with what the plan says; every rank calls this.

    Returns:
        The ranks that hold more or less, and both numbers of all ranks.

    Raises:
        MismatchError: the checkpoint's shapes are not the model's.
    """
    loaded = {name: held for name, held in checkpoint.tensors.items() if held.kind != "carried"}
    planned = place_by_plan(resolved).arrange(loaded).rank_bytes
    found: list[int] = all_gather_json(_count_local_bytes(model))
    wrong = [
        Mismatch("memory", f"{expected} bytes", f"{held} bytes", rank)
        for rank, (expected, held) in enumerate(zip(planned, found, strict=True))
        if expected != held
    ]
    return wrong, {"bytes_per_rank": found, "bytes_planned": list(planned)}


def _count_local_bytes(model: nn.Module) -> int:
    """Return the bytes of the model's tensors, those that share memory counted once."""
    local = (detach_local(tensor) for tensor in model_tensors(model).values())
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in local if tensor.numel()}.values())


_OVERHEAD_FACTOR = 1.2
"""What activations and the allocator take besides, as a factor."""
_FLOAT32_BYTES = 4


def fits_in_memory(model: nn.Module, device: torch.device) -> bool:
    """Say whether a model's weights and gradients fit unsharded, in float32, beside what the rank holds of it already.

    Args:
        model: on meta or not, whole or sharded; its own gradients are still to come.
        device: that it would be on.
    """
    whole = sum(parameter.numel() for parameter in model.parameters())
    own = sum(detach_local(parameter).numel() for parameter in model.parameters())
    free = _read_free_bytes(device)
    return free is None or _FLOAT32_BYTES * (2 * whole + own) * _OVERHEAD_FACTOR <= free


def free_memory(device: torch.device) -> None:
    """Give back the memory of models that nobody has any more: hooked modules and their hooks hold each other."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _read_free_bytes(device: torch.device) -> int | None:
    """Return the bytes that can be allocated, None where that cannot be told."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    try:
        lines = Path("/proc/meminfo").read_text("utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def compute_local_digest(local: torch.Tensor, tensor_map: TensorMap, shape: Sequence[int]) -> Digest:
    """Return the sums of a local tensor's bytes at their places in the parameter.

    Args:
        local: what the rank holds, on any device.
        tensor_map: of it over the whole parameter, as `runtime.tensor_map.tensor_map.local_form` gives it.
        shape: of the whole parameter.
    """
    assert tuple(local.shape) == tensor_map.shape
    sums = Digest()
    for extent in tensor_map.boxes:
        box = local[tuple(slice(start, start + size) for start, size in zip(extent.offset, extent.shape, strict=True))]
        sums.join(_compute_box_digest(box, unravel(extent.base, shape), shape))
    return sums


def _compute_box_digest(box: torch.Tensor, start: Sequence[int], shape: Sequence[int]) -> Digest:
    """Sum a box of a parameter, in as few calls as rows that lie evenly apart allow."""
    strides, size = row_major(shape), box.element_size()
    base = sum(index * stride for index, stride in zip(start, strides, strict=True))
    partial = [dim for dim in range(box.ndim) if box.shape[dim] != shape[dim]]
    inner = partial[-1] if partial else 0
    if inner == 0:
        return digest_tensor(box, base * size)
    outer = max((dim for dim in partial if dim < inner), default=0)
    sums = Digest()
    for place in product(*(range(length) for length in box.shape[:outer])):
        offset = base + sum(index * stride for index, stride in zip(place, strides, strict=False))
        rows = box[place].reshape(prod(box.shape[outer:inner]), -1)
        sums.join(digest_tensor(rows, offset * size, strides[inner - 1] * size))
    return sums
