"""The tensors of a model that a checkpoint fills: this rank's part of each, and the modules that hold it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from plans.errors import UsageError
from plans.placement import Packed, Placement, Replicate, Shard
from runtime.models.model import find_tied_names, model_tensors
from runtime.processes.group import find_device_type
from runtime.styles.placements import get_plan_placements
from runtime.tensor_map.tensor_map import TensorMap, shard_for_rank

__all__ = ["ParameterRef", "default_device", "find_module_entries", "find_parameter_refs", "mesh_axes"]

ModuleEntry = tuple[dict[str, Any], str]
"""A module's `_parameters` or `_buffers`, and a name in it."""


@dataclass(frozen=True)
class ParameterRef:
    """A tensor of a model that a checkpoint fills.

    Args:
        name: its name in the model; of tied names, the one that checkpoints store.
        tensor: the model's current tensor, on meta or in memory, a DTensor if it is sharded.
        entries: the places in modules that refer to it; a tied tensor has several.
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
        """Whether every rank holds the whole tensor."""
        return not isinstance(self.tensor, DTensor)

    def get_local(self) -> torch.Tensor:
        """Return this rank's local tensor, detached from any graph."""
        with torch.no_grad():
            value = self.tensor.to_local() if isinstance(self.tensor, DTensor) else self.tensor
        return value.detach()

    def map_local(self, tensor_map: TensorMap) -> TensorMap:
        """Return the tensor map of this rank's local tensor, given that of the whole tensor.

        Raises:
            UsageError: the tensor has a placement other than replicate and shard.
        """
        if not isinstance(self.tensor, DTensor):
            return tensor_map
        mesh = self.tensor.device_mesh
        coordinates = mesh.get_coordinate()
        assert coordinates is not None, "this rank is not in the model's mesh"
        local_map = shard_for_rank(tensor_map, self._resolve_placements(), tuple(mesh.shape), tuple(coordinates))
        shape = tuple(self.get_local().shape)
        is_empty = prod(local_map.shape) == prod(shape) == 0
        assert local_map.shape == shape or is_empty, f"{self.name}: {local_map.shape} is not {shape}"
        return local_map

    def replace(self, local: torch.Tensor) -> None:
        """Replace this rank's local tensor in every module that refers to it."""
        new = _wrap_like(self.tensor, local)
        for tensors, name in self.entries:
            tensors[name] = new

    def _resolve_placements(self) -> list[Placement]:
        assert isinstance(self.tensor, DTensor)
        placements: list[Placement] = []
        for placement in get_plan_placements(self.tensor):
            if not isinstance(placement, Replicate | Shard | Packed):
                raise UsageError(
                    f"{self.name} has the placement {placement}, which cannot be loaded",
                    hint="load the checkpoint before changing the placements of the model's parameters",
                    parameter=self.name,
                )
            placements.append(placement)
        return placements


def find_parameter_refs(model: nn.Module) -> dict[str, ParameterRef]:
    """Return a model's parameters and persistent buffers by name, tied ones once."""
    tied, entries = find_tied_names(model), find_module_entries(model)
    tensors = {name: tensor for name, tensor in model_tensors(model).items() if name not in tied}
    return {name: ParameterRef(name, tensor, entries[id(tensor)]) for name, tensor in tensors.items()}


def mesh_axes(refs: Iterable[ParameterRef]) -> tuple[DeviceMesh, ...]:
    """Return the axes of the largest mesh that a model is sharded over, innermost first; empty without one."""
    meshes = [ref.tensor.device_mesh for ref in refs if isinstance(ref.tensor, DTensor)]
    if not meshes:
        return ()
    largest = max(meshes, key=lambda mesh: mesh.size())
    if largest.ndim == 1:
        return (largest,)
    return tuple(largest[name] for name in reversed(largest.mesh_dim_names or ()))


def default_device(refs: Iterable[ParameterRef]) -> torch.device:
    """Return the default device of a model on meta: that of its mesh, or of the process group if it has no mesh."""
    axes = mesh_axes(refs)
    kind = axes[0].device_type if axes else find_device_type()
    return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)


def find_module_entries(model: nn.Module) -> Mapping[int, list[ModuleEntry]]:
    """Return the places in modules that refer to each tensor, by the tensor's `id`."""
    entries: defaultdict[int, list[ModuleEntry]] = defaultdict(list)
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    entries[id(tensor)].append((tensors, name))
    return entries


def _wrap_like(old: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
    """Return a tensor like `old` whose local tensor is `local`."""
    new = local
    if isinstance(old, DTensor):
        new = DTensor.from_local(
            local, old.device_mesh, old.placements, run_check=False, shape=old.shape, stride=old.stride()
        )
    return nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new
