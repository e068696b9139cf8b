"""Device meshes: plans.mesh.Mesh over the ranks of a process group, with the axis names of the contract."""

from __future__ import annotations

from collections.abc import Mapping

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from plans.errors import UsageError
from plans.mesh import Mesh, MeshName

__all__ = ["DeviceMeshes", "device_meshes", "inner_axis"]

DeviceMeshes = Mapping[MeshName, DeviceMesh]
"""The same ranks as one or two meshes; `experts` is there when experts have an axis of their own."""


def device_meshes(mesh: Mesh, device_type: str) -> DeviceMeshes:
    """Lay the ranks of the initialised process group out as the mesh says; every rank calls this.

    Args:
        mesh: sizes of the mesh axes.
        device_type: `cpu` or `cuda`.

    Raises:
        UsageError: there is no process group, or it has another size than the mesh.
    """
    if not dist.is_initialized():
        raise UsageError(
            "a device mesh needs a process group", hint="start through torchrun, or call init_process_group first"
        )
    if dist.get_world_size() != mesh.world_size:
        raise UsageError(
            f"the mesh has {mesh.world_size} ranks, the process group {dist.get_world_size()}",
            hint=f"start {mesh.world_size} processes",
            mesh=mesh.world_size,
            processes=dist.get_world_size(),
        )
    names: tuple[MeshName, ...] = ("dense", "experts") if mesh.ep > 1 else ("dense",)
    return {name: init_device_mesh(device_type, mesh.sizes(name), mesh_dim_names=mesh.axes(name)) for name in names}


def inner_axis(meshes: DeviceMeshes, name: MeshName) -> DeviceMesh:
    """Return a mesh's innermost axis, which the plan's entries shard over: `tp` of dense, `ep` of experts."""
    mesh = meshes[name]
    assert mesh.mesh_dim_names is not None
    return mesh[mesh.mesh_dim_names[-1]]
