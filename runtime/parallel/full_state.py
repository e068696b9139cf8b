"""The whole of a parallel model on one rank, to be saved or loaded where nothing is sharded."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from plans.errors import UsageError
from plans.placement import Packed, Placement, Replicate
from runtime.styles.collectives import all_gather
from runtime.styles.placements import get_plan_placements
from runtime.tensor_map.tensor_map import chunk_bounds

__all__ = ["full_state_dict"]


@torch.no_grad()
def full_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """Gather a parallel model's parameters and persistent buffers, bit for bit; every rank calls this.

    One parameter at a time is whole on every rank. `model.save_pretrained(folder, state_dict=...)` writes the result,
    and an unsharded model's `load_state_dict` takes it.

    Args:
        model: parallel or not, its weights loaded.

    Returns:
        On rank 0 whole tensors on the CPU by their names, tied ones as one tensor; nothing on other ranks.

    Raises:
        UsageError: the model is still on meta, or a parameter is placed in a way that is no shard.
    """
    state: dict[str, torch.Tensor] = {}
    gathered: dict[int, torch.Tensor] = {}
    # Asked of the model, not of its parameters: FSDP puts its pieces back then.
    for name, value in model.state_dict(keep_vars=True).items():
        if value.is_meta:
            raise UsageError(f"{name} is on meta, it has no values", hint="load the model's weights first", name=name)
        if id(value) not in gathered:
            whole = _gather_parameter(name, value) if isinstance(value, DTensor) else value.detach()
            gathered[id(value)] = whole.cpu() if _is_rank_0() else whole.new_empty(0)
        state[name] = gathered[id(value)]
    return state if _is_rank_0() else {}


def _is_rank_0() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _gather_parameter(name: str, parameter: DTensor) -> torch.Tensor:
    """Join a parameter's pieces, those of the outermost axis first: it cut what the inner one had left."""
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
                f"{name} is placed as {place}, which is no shard of a tensor",
                hint="sum what is partial before it is gathered; other placements are not gathered",
                name=name,
            )
        planned.append(place)
    return planned


def _compute_local_shape(shape: tuple[int, ...], placement: Placement, axis: DeviceMesh) -> tuple[int, ...]:
    """Return the shape of what this rank holds of a tensor."""
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
