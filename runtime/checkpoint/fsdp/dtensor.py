"""Pickled DTensors: a rank's shard with the mesh and the placements that say which part of the whole tensor it is.

The attributes of a mesh change every few releases of torch. Three facts are read: the ranks that the mesh is cut from,
how its axes step over them, and where the rank stands in it. The last one follows from the others, and must.

Source: `torch.distributed.tensor._dtensor_spec` and `torch.distributed.device_mesh` of torch 2.8 to 2.13.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod

from runtime.checkpoint.files.reading import is_size
from runtime.checkpoint.pickled.archive import Archive
from runtime.checkpoint.pickled.pickle import Global, PickledCall, PickledDict
from runtime.checkpoint.pickled.tensors import ArchivedTensor, parse_tensor, parse_view
from runtime.tensor_map.tensor_map import Shape, row_major

__all__ = ["AxisPlacement", "RankMesh", "RankTensor", "RankTensorParser"]

_DTENSORS = ("torch.distributed.tensor.DTensor", "torch.distributed._tensor.api.DTensor")
_SPEC = "torch.distributed.tensor._dtensor_spec.DTensorSpec"
_META = "torch.distributed.tensor._dtensor_spec.TensorMeta"
_MESH = "torch.distributed.device_mesh.DeviceMesh"
_PLACEMENTS = "torch.distributed.tensor.placement_types"
_PARAMETERS = ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state")
_LAYOUTS = "torch.distributed._mesh_layout"
_MAX_RANKS = 2**16


@dataclass(frozen=True, slots=True)
class AxisPlacement:
    """How one mesh axis holds a tensor.

    Args:
        dim: the sharded dim, None if the tensor is replicated.
        split_factor: how many times later axes have sharded the dim before this one did, 1 if they do so afterwards.
    """

    dim: int | None
    split_factor: int = 1


@dataclass(frozen=True, slots=True)
class RankMesh:
    """What a rank knows of a mesh.

    Args:
        ranks: the ranks that the mesh is cut from, in order.
        axes: the sizes and steps over the ranks of each axis; of several sizes, the last one steps fastest.
        coordinate: where this rank says that it stands, per axis.
    """

    ranks: Shape
    axes: tuple[tuple[tuple[int, int], ...], ...]
    coordinate: Shape

    @property
    def sizes(self) -> Shape:
        """The sizes of the axes."""
        return tuple(prod(size for size, _ in axis) for axis in self.axes)

    def find(self, rank: int) -> Shape | None:
        """Return where a rank stands, None if the mesh does not have it."""
        if rank not in self.ranks:
            return None
        index = self.ranks.index(rank)
        coordinate: list[int] = []
        for axis in self.axes:
            position = 0
            for size, step in axis:
                position = position * size + index // step % size
            coordinate.append(position)
        return tuple(coordinate)


@dataclass(frozen=True, slots=True)
class RankTensor:
    """A tensor in a rank's file.

    Args:
        local: the shard that the file stores, or the whole tensor.
        shape: the shape of the whole tensor.
        mesh: the mesh that shards it, None for a plain tensor.
        placements: one for each axis of the mesh.
    """

    local: ArchivedTensor
    shape: Shape
    mesh: RankMesh | None = None
    placements: tuple[AxisPlacement, ...] = ()


@dataclass(frozen=True)
class RankTensorParser:
    """Parses the tensors of one file. A mesh that they share is parsed once, because it may have thousands of ranks.

    Args:
        meshes: the meshes that were parsed, by the identity of what the pickle describes.
    """

    meshes: dict[int, RankMesh | None] = field(default_factory=dict)

    def parse(self, archive: Archive, value: object) -> RankTensor | None:
        """Return the plain tensor or the DTensor that a pickled value is, None if it is neither.

        Raises:
            HeaderError: its elements do not lie within their storage.
        """
        if (plain := parse_tensor(archive, value)) is not None:
            return RankTensor(plain, plain.shape)
        match value:
            case PickledCall(kind, (PickledCall() as data, bool(), *_)) if kind in _PARAMETERS:
                value = data
        match value:
            case PickledCall(
                "torch._tensor._rebuild_from_type_v2",
                (Global("torch._utils._rebuild_wrapper_subclass"), Global(kind), _, state),
            ) if kind in _DTENSORS:
                return self.parse_dtensor(archive, _get_fields(state))
        return None

    def parse_dtensor(self, archive: Archive, fields: Mapping[str, object]) -> RankTensor | None:
        """Return the DTensor with these attributes, None if they are not those of shards and replicas."""
        spec = _get_state(fields.get("_spec"), _SPEC)
        local = parse_tensor(archive, fields.get("_local_tensor"))
        shape = _parse_shape(spec.get("tensor_meta"))
        mesh = self.get_mesh(spec.get("mesh"))
        placements = _parse_placements(spec.get("placements"))
        if local is None or shape is None or mesh is None or placements is None:
            return None
        is_whole = len(placements) == len(mesh.coordinate) and len(local.shape) == len(shape)
        is_inside = all(placement.dim is None or placement.dim < len(shape) for placement in placements)
        return RankTensor(local, shape, mesh, placements) if is_whole and is_inside else None

    def get_mesh(self, value: object) -> RankMesh | None:
        """Return the mesh that a pickled value is, None if it is none that is known."""
        if id(value) not in self.meshes:
            self.meshes[id(value)] = _parse_mesh(value)
        return self.meshes[id(value)]


def _get_fields(state: object) -> Mapping[str, object]:
    """Return the attributes in an object's state, which is a dict, or a pair of a dict and of the slots."""
    parts = state if isinstance(state, tuple) else (state,)
    pairs = (pair for part in parts if isinstance(part, PickledDict) for pair in part.pairs)
    return {name: value for name, value in pairs if isinstance(name, str)}


def _get_state(value: object, kind: str) -> Mapping[str, object]:
    return _get_fields(value.state) if isinstance(value, PickledCall) and value.callee == kind else {}


def _parse_shape(value: object) -> Shape | None:
    match value:
        case PickledCall(kind, (PickledCall("torch.Size", (tuple(sizes),)), *_)) if kind == _META:
            return sizes if all(map(is_size, sizes)) else None
    return None


def _parse_mesh(value: object) -> RankMesh | None:
    fields = _get_state(value, _MESH)
    coordinate = _parse_numbers(fields.get("_coordinate_on_dim"))
    if "_layout" in fields:
        ranks = _parse_numbers(fields.get("_flatten_rank_map"))
        axes = _parse_layout(fields["_layout"])
    else:  # before torch 2.9, a mesh is a tensor of its ranks
        ranks = _parse_numbers(fields.get("_flatten_mesh_list"))
        view = parse_view(fields.get("mesh"))
        axes = tuple((pair,) for pair in zip(view.shape, row_major(view.shape), strict=True)) if view else None
    if ranks is None or axes is None or coordinate is None or len(axes) != len(coordinate):
        return None
    is_sound = all(0 < size <= _MAX_RANKS and 0 < step <= _MAX_RANKS for axis in axes for size, step in axis)
    mesh = RankMesh(ranks, axes, coordinate)
    return mesh if is_sound and prod(mesh.sizes) <= len(ranks) else None


def _parse_layout(value: object) -> tuple[tuple[tuple[int, int], ...], ...] | None:
    """Return the axes of a mesh's layout, which has one layout for each axis, or before torch 2.12 is one for all."""
    fields = _get_state(value, f"{_LAYOUTS}._MeshLayout")
    axes = fields.get("axes")
    if isinstance(axes, tuple):
        flat = [_get_state(axis, f"{_LAYOUTS}._FlatLayout") for axis in axes]
        pairs = [(axis.get("shape"), axis.get("stride")) for axis in flat]
    else:
        shape, stride = fields.get("shape"), fields.get("stride")
        if type(shape) is int and type(stride) is int:
            shape, stride = (shape,), (stride,)
        if not isinstance(shape, tuple) or not isinstance(stride, tuple) or len(shape) != len(stride):
            return None
        pairs = list(zip(shape, stride, strict=True))
    parsed = [_parse_axis(*pair) for pair in pairs]
    return tuple(axis for axis in parsed if axis is not None) if None not in parsed else None


def _parse_axis(shape: object, stride: object) -> tuple[tuple[int, int], ...] | None:
    sizes = _parse_numbers((shape,) if type(shape) is int else shape)
    steps = _parse_numbers((stride,) if type(stride) is int else stride)
    if sizes is None or steps is None or len(sizes) != len(steps):
        return None
    return tuple(zip(sizes, steps, strict=True))


def _parse_numbers(value: object) -> Shape | None:
    if not isinstance(value, list | tuple) or len(value) > _MAX_RANKS or not all(map(is_size, value)):
        return None
    return tuple(number for number in value if isinstance(number, int))


def _parse_placements(value: object) -> tuple[AxisPlacement, ...] | None:
    if not isinstance(value, tuple):
        return None
    placements = [_parse_placement(placement) for placement in value]
    return tuple(placement for placement in placements if placement) if all(placements) else None


def _parse_placement(value: object) -> AxisPlacement | None:
    """Return a placement, None if it is another one than shards and replicas: the ranks hold parts of a sum, say."""
    if not isinstance(value, PickledCall):
        return None
    fields = _get_fields(value.state)
    match value.callee, fields:
        case (name, {}) if name == f"{_PLACEMENTS}.Replicate":
            return AxisPlacement(None)
        case (name, {"dim": int(dim)}) if name == f"{_PLACEMENTS}.Shard" and is_size(dim):
            return AxisPlacement(dim)
        case (name, {"dim": int(dim), "split_factor": int(factor)}) if (
            name == f"{_PLACEMENTS}._StridedShard" and is_size(dim) and is_size(factor) and factor > 0
        ):
            return AxisPlacement(dim, factor)
    return None
