"""A rank's share of a model: its local tensors, their bytes and digests, its shard of whole tensors, free memory."""

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
from runtime.parallel.fsdp import count_gathered_at_once
from runtime.parallel.mismatch import Mismatch
from runtime.parallel.pipeline import find_stage
from runtime.processes.agreement import all_gather_json
from runtime.processes.thread_ranks import find_thread_device
from runtime.styles.placements import cut_local_shard
from runtime.tensor_map.tensor_map import TensorMap, row_major, unravel

__all__ = [
    "OVERHEAD_FACTOR",
    "check_memory",
    "compute_local_digest",
    "count_local_bytes",
    "detach_local",
    "fits_in_memory",
    "free_memory",
    "read_free_bytes",
    "slice_local_shard",
]


def detach_local(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's local tensor, detached from autograd."""
    with torch.no_grad():
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def slice_local_shard(tensor: torch.Tensor, row: ResolvedParameter, mesh: Mesh) -> torch.Tensor:
    """Return this rank's shard of a whole tensor, sharded by the plan's entry first, then by FSDP."""
    axes = zip(row.placements, mesh.sizes(row.mesh), mesh.coordinates(row.mesh, dist.get_rank()), strict=True)
    for placement, size, index in reversed(list(axes)):
        tensor = cut_local_shard(tensor, placement, size, index)
    return tensor


def check_memory(
    own_bytes: int, resolved: ResolvedPlan, checkpoint: Checkpoint
) -> tuple[list[Mismatch], dict[str, object]]:
    """Compare the bytes that each rank holds with what the plan predicts. Collective.

    Args:
        own_bytes: the bytes of this rank's tensors.
        resolved: the plan.
        checkpoint: the checkpoint.

    Returns:
        A mismatch for each rank that holds more or less, and both numbers of all ranks.

    Raises:
        MismatchError: the checkpoint's shapes are not the model's.
    """
    loaded = {name: tensor for name, tensor in checkpoint.tensors.items() if tensor.kind != "carried"}
    planned = place_by_plan(resolved).arrange(loaded).rank_bytes
    allocated: list[int] = all_gather_json(own_bytes)
    wrong = [
        Mismatch("memory", f"{expected} bytes", f"{actual} bytes", rank)
        for rank, (expected, actual) in enumerate(zip(planned, allocated, strict=True))
        if expected != actual
    ]
    return wrong, {"bytes_per_rank": allocated, "bytes_planned": list(planned)}


def count_local_bytes(model: nn.Module) -> int:
    """Return the bytes of the model's local tensors, counting shared memory once."""
    local = (detach_local(tensor) for tensor in model_tensors(model).values())
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in local if tensor.numel()}.values())


OVERHEAD_FACTOR = 1.2
"""Factor for what activations and the allocator need besides weights and gradients."""


def fits_in_memory(model: nn.Module, device: torch.device, dtype: torch.dtype = torch.float32) -> bool:
    """Return whether an unsharded copy of a model in a dtype, with gradients, fits beside the rank's own share.

    Args:
        model: the rank's model, sharded or not, on meta or not. Memory for its own gradients is counted too, and for
            what FSDP gathers at once, weights and gradients.
        device: the device that the copy would be on.
        dtype: the dtype of the copy, and of the rank's gradients.
    """
    stage = find_stage(model)
    whole = sum(parameter.numel() for parameter in model.parameters()) * (stage.count if stage is not None else 1)
    own = sum(detach_local(parameter).numel() for parameter in model.parameters()) + 2 * count_gathered_at_once(model)
    if find_thread_device() is not None:
        own *= dist.get_world_size()  # the shares of all ranks lie in the same memory
    free = read_free_bytes(device)
    return free is None or dtype.itemsize * (2 * whole + own) * OVERHEAD_FACTOR <= free


def free_memory(device: torch.device) -> None:
    """Free the memory of models that are no longer referenced; hooks and modules form cycles, hence the collection."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def read_free_bytes(device: torch.device) -> int | None:
    """Return the bytes that can be allocated, None if that is unknown."""
    if device.type == "cuda":
        allocated = torch.cuda.memory_allocated(device)
        free, total = torch.cuda.mem_get_info(device)
        find_fraction = getattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 1.0)  # since torch 2.8
        allowed = int(find_fraction(device) * total)
        return min(free + torch.cuda.memory_reserved(device), allowed) - allocated
    try:
        lines = Path("/proc/meminfo").read_text("utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def compute_local_digest(local: torch.Tensor, tensor_map: TensorMap, shape: Sequence[int]) -> Digest:
    """Return a local tensor's contribution to its parameter's digest.

    Args:
        local: the rank's local tensor, on any device.
        tensor_map: the map of the local tensor over the whole parameter, from `shard_for_rank`.
        shape: the shape of the whole parameter.
    """
    assert tuple(local.shape) == tensor_map.shape
    digest = Digest()
    for box in tensor_map.boxes:
        part = local[tuple(slice(start, start + size) for start, size in zip(box.offset, box.shape, strict=True))]
        digest.join(_compute_box_digest(part, unravel(box.base, shape), shape))
    return digest


def _compute_box_digest(box: torch.Tensor, start: Sequence[int], shape: Sequence[int]) -> Digest:
    """Return the contribution of one box of a parameter, in as few calls as evenly spaced rows allow."""
    strides, size = row_major(shape), box.element_size()
    base = sum(index * stride for index, stride in zip(start, strides, strict=True))
    partial = [dim for dim in range(box.ndim) if box.shape[dim] != shape[dim]]
    inner = partial[-1] if partial else 0
    if inner == 0:
        return digest_tensor(box, base * size)
    outer = max((dim for dim in partial if dim < inner), default=0)
    digest = Digest()
    for indices in product(*(range(length) for length in box.shape[:outer])):
        offset = base + sum(index * stride for index, stride in zip(indices, strides, strict=False))
        rows = box[indices].reshape(prod(box.shape[outer:inner]), -1)
        digest.join(digest_tensor(rows, offset * size, strides[inner - 1] * size))
    return digest
