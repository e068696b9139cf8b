"""What ranks hold of a model: their local tensors, the bytes of those, and their pieces of whole tensors."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from plans.mesh import Mesh
from plans.resolved import ResolvedParameter, ResolvedPlan
from runtime.checkpoint.content import Checkpoint
from runtime.inspecting.laying import place_by_plan
from runtime.models.model import model_tensors
from runtime.parallel.mismatch import Mismatch
from runtime.processes.agreement import all_gather_json
from runtime.styles.placements import cut_local_shard

__all__ = ["check_memory", "detach_local", "slice_local_shard"]


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
