"""Gather a parallel model's whole state on one rank, so that it can be saved or loaded into an unsharded model."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from plans.errors import UsageError
from plans.placement import Packed, Placement, Replicate
from runtime.parallel.pipeline import find_stage
from runtime.styles.collectives import all_gather
from runtime.styles.placements import get_plan_placements
from runtime.tensor_map.tensor_map import chunk_bounds

__all__ = ["full_state_dict"]


@torch.no_grad()
def full_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """Gather a parallel model's parameters and persistent buffers, bit for bit. Collective: every rank must call it.

    Only one parameter at a time is whole on every rank. `model.save_pretrained(folder, state_dict=...)` writes the
    result, and an unsharded model's `load_state_dict` accepts it.

    Args:
        model: a model with its weights loaded, parallel or not.

    Returns:
        On rank 0, whole tensors on the CPU by name, tied names sharing one tensor; an empty dict on other ranks.

    Raises:
        UsageError: the model is one stage of several, or still on the meta device, or a parameter's placement is not a
            shard or replica.
    """
    if find_stage(model) is not None:
        raise UsageError(
            "a model of several pipeline stages has no whole state on any rank",
            hint="reshard the checkpoint that it was loaded from",
        )
    state: dict[str, torch.Tensor] = {}
    gathered: dict[int, torch.Tensor] = {}
    # state_dict() of the model, not its parameters: FSDP reshards what a forward left unsharded.
    for name, value in model.state_dict(keep_vars=True).items():
        if value.is_meta:
            raise UsageError(
                f"{name} is on the meta device and has no values", hint="load the model's weights first", name=name
            )
        if id(value) not in gathered:
            whole = _gather_parameter(name, value) if isinstance(value, DTensor) else value.detach()
            gathered[id(value)] = whole.cpu() if _is_rank_0() else whole.new_empty(0)
        state[name] = gathered[id(value)]
    return state if _is_rank_0() else {}


def _is_rank_0() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _gather_parameter(name: str, parameter: DTensor) -> torch.Tensor:
    """Gather a parameter's shards, outermost axis first, since that axis sharded what the inner one had left."""
    mesh, planned = parameter.device_mesh, _read_placements(name, parameter)
    axes = [mesh] if mesh.ndim == 1 else [mesh[name] for name in mesh.mesh_dim_names or ()]
    shape, cuts = tuple(parameter.shape), []
    for axis, placement in zip(reversed(axes), reversed(planned), strict=True):
        cuts.append((axis, placement, shape))
        shape = _compute_local_shape(shape, placement, axis)
    value = parameter.to_local()
    for axis, placement, before in reversed(cuts):
        value = _gather_shards(value, placement, axis, before)
    return value


def _read_placements(name: str, parameter: DTensor) -> list[Placement]:
    planned: list[Placement] = []
    for place in get_plan_placements(parameter):
        if not isinstance(place, Placement):
            raise UsageError(
                f"{name} has the placement {place}, which is neither a shard nor a replica",
                hint="reduce partial sums before gathering; other placements are not supported",
                name=name,
            )
        planned.append(place)
    return planned


def _compute_local_shape(shape: tuple[int, ...], placement: Placement, axis: DeviceMesh) -> tuple[int, ...]:
    """Return the shape of this rank's shard of a tensor."""
    if isinstance(placement, Replicate):
        return shape
    length = chunk_bounds(shape[placement.dim], axis.size(), axis.get_local_rank())[1]
    return (*shape[: placement.dim], length, *shape[placement.dim + 1 :])


def _gather_shards(value: torch.Tensor, placement: Placement, axis: DeviceMesh, shape: tuple[int, ...]) -> torch.Tensor:
    if isinstance(placement, Replicate):
        return value
    joined = all_gather(value, axis, shape[placement.dim], placement.dim)
    if isinstance(placement, Packed):
        dim, before = placement.dim, joined.shape
        by_rank = joined.reshape(*before[:dim], axis.size(), placement.groups, -1, *before[dim + 1 :])
        joined = by_rank.transpose(dim, dim + 1).reshape(before)
    return joined
