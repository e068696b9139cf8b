"""Device meshes: the axes of a `plans.mesh.Mesh`, built over the ranks of a process group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from plans.errors import UsageError
from plans.mesh import Mesh, MeshName
from plans.text import first_line
from runtime.processes.group import find_device_type

__all__ = ["DeviceMeshes", "as_device_meshes", "device_meshes"]

_MESH_NAMES: tuple[MeshName, ...] = ("dense", "experts")


@dataclass(frozen=True)
class DeviceMeshes:
    """The ranks of a process group as one or two device meshes.

    Args:
        sizes: the sizes of the mesh axes.
        axes: one-dimensional meshes by axis name; `ep` and `efsdp` exist if experts have axes of their own, and
            `replicate` and `pp` if there are several replicas or stages.
        hybrid: the two-dimensional meshes of `replicate` and a data parallel axis, by that axis' name; empty unless
            there are several replicas.
    """

    sizes: Mesh
    axes: Mapping[str, DeviceMesh]
    hybrid: Mapping[str, DeviceMesh] = field(default_factory=dict)

    def axis(self, name: str) -> DeviceMesh:
        """Return one mesh axis.

        Raises:
            UsageError: the mesh has no axis with this name.
        """
        if name not in self.axes:
            raise UsageError(
                f"the plan needs the mesh axis {name!r}, but the device mesh has " + ", ".join(sorted(self.axes)),
                hint=f"build it with device_meshes(Mesh(...)), or name an axis of your device mesh {name!r}",
                axis=name,
            )
        return self.axes[name]

    def data_mesh(self, name: str) -> DeviceMesh:
        """Return the mesh that FSDP works on: a data parallel axis, under that of the replicas if there are several.

        Raises:
            UsageError: the mesh has no axis with this name.
        """
        return self.hybrid[name] if name in self.hybrid else self.axis(name)

    @property
    def spanning_axes(self) -> tuple[DeviceMesh, ...]:
        """The axes that together span every rank exactly once, innermost first."""
        dense = tuple(self.axes[name] for name in ("tp", "fsdp", "replicate", "pp") if name in self.axes)
        return dense or (self.axes["ep"],)


_MESH_CACHE: WeakKeyDictionary[dist.ProcessGroup, dict[tuple[Mesh, str], DeviceMeshes]] = WeakKeyDictionary()


def device_meshes(mesh: Mesh, device_type: str) -> DeviceMeshes:
    """Build the device meshes over the ranks of the initialized process group. Collective: every rank must call it.

    The meshes of one process group are cached by their sizes, because every axis has process groups of its own, with
    threads and sockets.

    Args:
        mesh: the sizes of the mesh axes.
        device_type: `cpu` or `cuda`.

    Raises:
        UsageError: there is no process group, or its size differs from the mesh's.
    """
    if not dist.is_initialized():
        raise UsageError(
            "a device mesh needs a process group", hint="start through torchrun, or call init_process_group first"
        )
    if dist.get_world_size() != mesh.world_size:
        raise UsageError(
            f"the mesh has {mesh.world_size} ranks, but the process group has {dist.get_world_size()}",
            hint=f"start {mesh.world_size} processes",
            mesh=mesh.world_size,
            processes=dist.get_world_size(),
        )
    world = dist.group.WORLD
    assert world is not None
    cached = _MESH_CACHE.setdefault(world, {})
    if (mesh, device_type) not in cached:
        cached[mesh, device_type] = _build_device_meshes(mesh, device_type)
    return cached[mesh, device_type]


def _build_device_meshes(mesh: Mesh, device_type: str) -> DeviceMeshes:
    axes: dict[str, DeviceMesh] = {}
    hybrid: dict[str, DeviceMesh] = {}
    outer = {axis: size for axis, size in (("pp", mesh.pp), ("replicate", mesh.replicate)) if size > 1}
    for name in _MESH_NAMES if mesh.ep > 1 else _MESH_NAMES[:1]:
        sizes = {**outer, **dict(zip(mesh.axes(name), mesh.sizes(name), strict=True))}
        whole = init_device_mesh(device_type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
        axes |= {axis: _get_axis(whole, axis) for axis in sizes}
        if mesh.replicate > 1:
            hybrid[mesh.axes(name)[0]] = _get_axis(whole, ("replicate", mesh.axes(name)[0]))
    return DeviceMeshes(mesh, axes, hybrid)


def as_device_meshes(mesh: DeviceMeshes | DeviceMesh | Mesh) -> DeviceMeshes:
    """Return device meshes for the sizes, the device mesh or the device meshes that a caller has.

    Args:
        mesh: sizes, which are built on the process group's device; a device mesh with the axes `fsdp`, `tp` or both,
            or with `replicate` before `fsdp`, or with the single axis `ep`, over which dense parameters are replicated;
            or device meshes, returned as they are.

    Raises:
        UsageError: the argument is not a mesh, its axes have other names, or `device_meshes` raises it.
    """
    if isinstance(mesh, DeviceMeshes):
        return mesh
    if isinstance(mesh, Mesh):
        return device_meshes(mesh, find_device_type())
    if not isinstance(mesh, DeviceMesh):
        raise UsageError(
            f"{mesh!r} is not a mesh", hint="pass the sizes, plans.mesh.Mesh(tp=2), or a device mesh", mesh=repr(mesh)
        )
    names = mesh.mesh_dim_names or ()
    sizes = dict(zip(names, mesh.shape, strict=False))
    if names == ("ep",):
        return DeviceMeshes(Mesh(tp=sizes["ep"], ep=sizes["ep"]), {"ep": mesh})
    if not names or names not in _KNOWN_AXES:
        raise UsageError(
            f"a device mesh {f'with the axes {names}' if names else 'without axis names'} cannot carry a plan",
            hint="name its axes ('tp',), ('ep',), ('fsdp', 'tp') or ('replicate', 'fsdp', 'tp'), or pass the sizes as "
            "a plans.mesh.Mesh",
            axes=list(names),
        )
    hybrid = {"fsdp": _get_axis(mesh, ("replicate", "fsdp"))} if sizes.get("replicate", 1) > 1 else {}
    return DeviceMeshes(Mesh(**sizes), {name: _get_axis(mesh, name) for name in names}, hybrid)


_KNOWN_AXES = (("tp",), ("fsdp",), ("fsdp", "tp"), ("replicate", "fsdp"), ("replicate", "fsdp", "tp"))


def _get_axis(mesh: DeviceMesh, name: str | tuple[str, ...]) -> DeviceMesh:
    """Return axes of a device mesh, which torch 2.8 refuses if the mesh is, or equals, a part of another mesh."""
    try:
        return mesh[name]
    except RuntimeError as error:
        raise UsageError(
            f"torch {torch.__version__} cannot slice {name!r} from this device mesh: {first_line(error)}",
            hint="create no larger device mesh that contains this one, or install a newer torch",
            axis=name,
        ) from error
