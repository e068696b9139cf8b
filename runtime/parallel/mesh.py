"""Device meshes: plans.mesh.Mesh over the ranks of a process group, with the axis names of the contract."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from plans.errors import UsageError
from plans.mesh import Mesh, MeshName
from plans.text import first_line
from runtime.processes.group import uses_nccl

__all__ = ["DeviceMeshes", "as_device_meshes", "device_meshes"]

_MESH_NAMES: tuple[MeshName, ...] = ("dense", "experts")


@dataclass(frozen=True)
class DeviceMeshes:
    """The same ranks as one or two meshes.

    Args:
        sizes: of the mesh axes.
        axes: one-dimensional meshes by axis name; `ep` and `efsdp` are there when experts have an axis of their own.
    """

    sizes: Mesh
    axes: Mapping[str, DeviceMesh]

    def axis(self, name: str) -> DeviceMesh:
        """Return one axis.

        Raises:
            UsageError: the mesh has no axis of this name.
        """
        if name not in self.axes:
            raise UsageError(
                f"the plan works over the axis {name!r}, the device mesh has " + ", ".join(sorted(self.axes)),
                hint=f"build it with device_meshes(Mesh(...)), or name an axis of your device mesh {name!r}",
                axis=name,
            )
        return self.axes[name]

    @property
    def spanning_axes(self) -> tuple[DeviceMesh, ...]:
        """The axes, innermost first, that together hold every rank once."""
        found = tuple(self.axes[name] for name in ("tp", "fsdp") if name in self.axes)
        return found or (self.axes["ep"],)


_MESH_CACHE: WeakKeyDictionary[dist.ProcessGroup, dict[tuple[Mesh, str], DeviceMeshes]] = WeakKeyDictionary()


def device_meshes(mesh: Mesh, device_type: str) -> DeviceMeshes:
    """Lay the ranks of the initialised process group out as the mesh says; every rank calls this.

    For one process group and sizes it is done once: every axis has process groups of its own, with threads and sockets.

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
    world = dist.group.WORLD
    assert world is not None
    known = _MESH_CACHE.setdefault(world, {})
    if (mesh, device_type) not in known:
        known[mesh, device_type] = _build_device_meshes(mesh, device_type)
    return known[mesh, device_type]


def _build_device_meshes(mesh: Mesh, device_type: str) -> DeviceMeshes:
    axes: dict[str, DeviceMesh] = {}
    for name in _MESH_NAMES if mesh.ep > 1 else _MESH_NAMES[:1]:
        whole = init_device_mesh(device_type, mesh.sizes(name), mesh_dim_names=mesh.axes(name))
        axes |= {axis: _get_axis(whole, axis) for axis in mesh.axes(name)}
    return DeviceMeshes(mesh, axes)


def as_device_meshes(mesh: DeviceMeshes | DeviceMesh | Mesh) -> DeviceMeshes:
    """Return device meshes for whatever a caller has: sizes, a device mesh of their own, or these themselves.

    Args:
        mesh: sizes are laid out on the process group's device; a device mesh has one or more of the axes `fsdp` and
            `tp`, or is one axis `ep` over which dense parameters are whole.

    Raises:
        UsageError: it is no mesh, its axes have other names, or as `device_meshes`.
    """
    if isinstance(mesh, DeviceMeshes):
        return mesh
    if isinstance(mesh, Mesh):
        return device_meshes(mesh, "cuda" if dist.is_initialized() and uses_nccl() else "cpu")
    if not isinstance(mesh, DeviceMesh):
        raise UsageError(
            f"{mesh!r} is no mesh", hint="pass the sizes, plans.mesh.Mesh(tp=2), or a device mesh", mesh=repr(mesh)
        )
    names = mesh.mesh_dim_names or ()
    sizes = dict(zip(names, mesh.shape, strict=False))
    if names == ("ep",):
        return DeviceMeshes(Mesh(tp=sizes["ep"], ep=sizes["ep"]), {"ep": mesh})
    if not names or names not in (("tp",), ("fsdp",), ("fsdp", "tp")):
        raise UsageError(
            f"a device mesh with the axes {names or 'without names'} cannot carry a plan",
            hint="name its axes ('tp',), ('ep',) or ('fsdp', 'tp'), or pass the sizes as a plans.mesh.Mesh",
            axes=list(names),
        )
    return DeviceMeshes(Mesh(**sizes), {name: _get_axis(mesh, name) for name in names})


def _get_axis(mesh: DeviceMesh, name: str) -> DeviceMesh:
    """Return one axis of a device mesh; torch 2.8 can take none of a mesh that is, or equals, a part of another."""
    try:
        return mesh[name]
    except RuntimeError as error:
        raise UsageError(
            f"torch {torch.__version__} cannot take the axis {name!r} of this device mesh: {first_line(error)}",
            hint="start without device meshes of which this one is a part, or install a newer torch",
            axis=name,
        ) from error
