"""What crosses the boundary of a block: the tensors in a call's arguments and results, whole or a rank's slices."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from runtime.styles.sequence_slices import gather_slice
from runtime.tensor_map.tensor_map import chunk_bounds

__all__ = [
    "Layouts",
    "Slice",
    "get_local",
    "list_tensors",
    "map_tensors",
    "name_tensors",
    "replace_tensors",
    "write_back",
]


def list_tensors(value: object) -> list[torch.Tensor]:
    """Return the tensors in nested tuples, lists and mappings, in order."""
    return list(name_tensors(value, "").values())


def name_tensors(value: object, name: str) -> dict[str, torch.Tensor]:
    """Return the tensors in nested tuples, lists and mappings, in order, by names that begin with a name."""
    if isinstance(value, torch.Tensor):
        return {name: value}
    items: Iterable[tuple[object, object]] = value.items() if isinstance(value, MutableMapping) else ()
    items = enumerate(value) if isinstance(value, (list, tuple)) else items
    return {inner: tensor for key, item in items for inner, tensor in name_tensors(item, f"{name}[{key}]").items()}


def replace_tensors(value: object, tensors: Sequence[torch.Tensor]) -> object:
    """Return a copy of nested containers with other tensors in the place of theirs, in order."""
    following = iter(tensors)
    return map_tensors(value, lambda _: next(following))


def map_tensors(value: object, function: Callable[[torch.Tensor], torch.Tensor]) -> object:
    """Return a copy of nested containers with a function applied to each tensor; other values stay as they are."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, MutableMapping):
        changed = {key: map_tensors(item, function) for key, item in value.items()}
        return type(value)(**changed) if hasattr(value, "to_tuple") else _copy_mapping(value, changed)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        fields: Any = [map_tensors(item, function) for item in value]
        return type(value)(*fields)
    if isinstance(value, (list, tuple)):
        items: Any = [map_tensors(item, function) for item in value]
        return type(value)(items)
    return value


def _copy_mapping(value: MutableMapping[Any, Any], items: Mapping[Any, Any]) -> MutableMapping[Any, Any]:
    copied = copy.copy(value)
    copied.clear()
    copied.update(items)
    return copied


def write_back(original: object, changed: object) -> None:
    """Bring what a call did to containers among its arguments into the caller's containers.

    Args:
        original: the caller's arguments.
        changed: copies of them, after the call.
    """
    if isinstance(original, MutableMapping) and isinstance(changed, Mapping):
        for key in [key for key in original if key not in changed]:
            del original[key]
        for key, item in changed.items():
            if key in original and not isinstance(item, torch.Tensor):
                write_back(original[key], item)
            if key not in original or isinstance(item, (torch.Tensor, tuple)):
                original[key] = item
    elif isinstance(original, list) and isinstance(changed, list):
        original[:] = changed
    elif isinstance(original, tuple):
        assert isinstance(changed, tuple)
        for own, other in zip(original, changed, strict=True):
            write_back(own, other)


@dataclass(frozen=True)
class Slice:
    """How a tensor at a boundary lies on this rank.

    Args:
        dim: the dim along which ranks hold slices, None for a whole tensor.
        axis: the mesh axis of the slices.
        is_dtensor: whether it is a DTensor of the whole tensor's shape.
    """

    dim: int | None = None
    axis: DeviceMesh | None = None
    is_dtensor: bool = False

    def cut(self, whole: torch.Tensor) -> torch.Tensor:
        """Return this rank's slice of a whole tensor."""
        if self.dim is None or self.axis is None:
            return whole
        return whole.narrow(
            self.dim, *chunk_bounds(whole.shape[self.dim], self.axis.size(), self.axis.get_local_rank())
        )

    def wrap(self, local: torch.Tensor) -> torch.Tensor:
        """Return this rank's slice as the model hands it around."""
        if not self.is_dtensor:
            return local
        assert self.axis is not None
        placement = Replicate() if self.dim is None else Shard(self.dim)
        return DTensor.from_local(local, self.axis, [placement], run_check=False)


def get_local(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's slice of a tensor, or the whole of one that is whole."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@dataclass
class Layouts:
    """The layouts of tensors at boundaries.

    Where the plan shards by feature or by head, a block returns a plain tensor that is a slice. Which dim it is shows
    when it is compared with the whole tensor, and is kept for the block that takes it.

    Args:
        axis: the mesh axis over which blocks shard what they return, None where ranks shard nothing.
        slices: the plain slices that blocks returned, with the whole tensors, by id.
    """

    axis: DeviceMesh | None
    slices: dict[int, tuple[torch.Tensor, Slice, torch.Tensor]] = field(default_factory=dict)

    def read(self, tensor: torch.Tensor) -> tuple[Slice, torch.Tensor]:
        """Return the layout of a block's input, and the whole tensor. Collective for DTensors."""
        if isinstance(tensor, DTensor):
            (placement,) = tensor.placements
            dim = placement.dim if isinstance(placement, Shard) else None
            with torch.no_grad():
                return Slice(dim, tensor.device_mesh, True), gather_slice(tensor, tensor.device_mesh)
        if id(tensor) in self.slices:
            _, layout, whole = self.slices[id(tensor)]
            return layout, whole
        return Slice(), tensor

    def infer(self, found: torch.Tensor, whole: torch.Tensor) -> Slice | None:
        """Return the layout of a block's output, None if its shape is neither the whole's nor a slice's."""
        if isinstance(found, DTensor):
            (placement,) = found.placements
            dim = placement.dim if isinstance(placement, Shard) else None
            return Slice(dim, found.device_mesh, True) if found.shape == whole.shape else None
        if found.shape == whole.shape:
            return Slice()
        for layout in self._list_candidates(whole):
            if layout.cut(whole).shape == found.shape:
                return layout
        return None

    def _list_candidates(self, whole: torch.Tensor) -> Iterator[Slice]:
        if self.axis is not None:
            yield from (Slice(dim, self.axis) for dim in range(whole.ndim) if whole.shape[dim] % self.axis.size() == 0)

    def give(self, whole: torch.Tensor, layout: Slice) -> torch.Tensor:
        """Return a whole tensor as a block of the parallel model returns it, which may be changed in place."""
        leaf = layout.cut(whole.detach()).clone().requires_grad_(whole.requires_grad)
        given = layout.wrap(leaf.clone() if leaf.requires_grad else leaf)
        if layout.dim is not None and not layout.is_dtensor:
            self.slices[id(given)] = given, layout, whole
        return given
