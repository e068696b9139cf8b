"""Slots: the tensors of a model that a checkpoint fills, which part of each this rank holds, and where it goes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from plans.errors import UsageError
from plans.placement import Packed, Placement, Replicate, Shard
from runtime.models.model import find_tied_names, model_tensors
from runtime.processes.group import uses_nccl
from runtime.styles.placements import get_plan_placements
from runtime.tensor_map.tensor_map import TensorMap, shard_for_rank

__all__ = ["ParameterRef", "default_device", "find_module_entries", "find_parameter_refs", "mesh_axes"]

ModuleEntry = tuple[dict[str, Any], str]
"""A table of a module's parameters or buffers, and the name in it."""


@dataclass(frozen=True)
class ParameterRef:
    """A tensor of a model that a checkpoint fills.

    Args:
        name: in the model; of tied names the one that holds the bytes.
        tensor: that the model has now, on meta or in memory, sharded or whole.
        entries: where the model keeps it; tied names are several places of one tensor.
    """

    name: str
    tensor: torch.Tensor
    entries: Sequence[ModuleEntry]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole tensor."""
        return tuple(self.tensor.shape)

    @property
    def is_whole(self) -> bool:
        """Whether the tensor is whole on this rank, and so on every other one."""
        return not isinstance(self.tensor, DTensor)

    def get_local(self) -> torch.Tensor:
        """Return what this rank holds, outside of any graph."""
        with torch.no_grad():
            value = self.tensor.to_local() if isinstance(self.tensor, DTensor) else self.tensor
        return value.detach()

    def map_local(self, tensor_map: TensorMap) -> TensorMap:
        """Return the form of what this rank holds, given that of the whole tensor.

        Raises:
            UsageError: the tensor is placed in a way that is no shard.
        """
        if not isinstance(self.tensor, DTensor):
            return tensor_map
        mesh = self.tensor.device_mesh
        coordinates = mesh.get_coordinate()
        assert coordinates is not None, "a rank outside of a model's mesh has none of it"
        found = shard_for_rank(tensor_map, self._resolve_placements(), tuple(mesh.shape), tuple(coordinates))
        held = tuple(self.get_local().shape)
        assert found.shape == held or prod(found.shape) == prod(held) == 0, f"{self.name}: {found.shape} is not {held}"
        return found

    def replace(self, local: torch.Tensor) -> None:
        """Put another local tensor in the place of this one wherever the model holds it."""
        new = _wrap_like(self.tensor, local)
        for table, name in self.entries:
            table[name] = new

    def _resolve_placements(self) -> list[Placement]:
        assert isinstance(self.tensor, DTensor)
        found: list[Placement] = []
        for placement in get_plan_placements(self.tensor):
            if not isinstance(placement, Replicate | Shard | Packed):
                raise UsageError(
                    f"{self.name} is placed as {placement}, which is no shard of a tensor",
                    hint="load before anything else has changed the model's parameters",
                    parameter=self.name,
                )
            found.append(placement)
        return found


def find_parameter_refs(model: nn.Module) -> dict[str, ParameterRef]:
    """Return what a checkpoint fills of a model, by name: its parameters and persistent buffers, tied ones once."""
    tied, holders = find_tied_names(model), find_module_entries(model)
    tensors = {name: tensor for name, tensor in model_tensors(model).items() if name not in tied}
    return {name: ParameterRef(name, tensor, holders[id(tensor)]) for name, tensor in tensors.items()}


def mesh_axes(refs: Iterable[ParameterRef]) -> tuple[DeviceMesh, ...]:
    """Return the mesh axes, innermost first, whose ranks hold a model together; none of one that is not parallel."""
    meshes = [slot.tensor.device_mesh for slot in refs if isinstance(slot.tensor, DTensor)]
    if not meshes:
        return ()
    largest = max(meshes, key=lambda mesh: mesh.size())
    if largest.ndim == 1:
        return (largest,)
    return tuple(largest[name] for name in reversed(largest.mesh_dim_names or ()))


def default_device(refs: Iterable[ParameterRef]) -> torch.device:
    """Return where tensors on meta go: to the device of the mesh, or of the process group where there is no mesh."""
    axes = mesh_axes(refs)
    kind = axes[0].device_type if axes else "cuda" if dist.is_initialized() and uses_nccl() else "cpu"
    return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)


def find_module_entries(model: nn.Module) -> Mapping[int, list[ModuleEntry]]:
    """Return where the model holds each tensor, by its identity."""
    holders: defaultdict[int, list[ModuleEntry]] = defaultdict(list)
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is not None:
                    holders[id(tensor)].append((table, name))
    return holders


def _wrap_like(old: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
    """Return what takes the place of `old` when its local tensor is `local`."""
    new = local
    if isinstance(old, DTensor):
        new = DTensor.from_local(
            local, old.device_mesh, old.placements, run_check=False, shape=old.shape, stride=old.stride()
        )
    return nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new
