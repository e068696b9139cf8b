"""Checkpoints into models: a rank's own file into its local tensors, or whole tensors into an unsharded model."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from plans.errors import CheckpointError, IncompleteError, MismatchError
from runtime.checkpoint.manifest import read_manifest
from runtime.checkpoint.ranks import held_by, rank_file
from runtime.checkpoint.safetensors import StoredTensor, read_exactly, read_header
from runtime.checkpoint.side_files import check_contained
from runtime.model import DTYPES, model_tensors
from runtime.wording import listed

__all__ = ["load_ranks", "load_whole"]

_Holder = tuple[dict[str, Any], str]

_SOURCE = "the checkpoint"


def load_ranks(
    model: nn.Module, folder: Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> None:
    """Fill this rank's local tensors from its own rank file; no other rank's file is opened.

    Args:
        model: parallelized as the folder was laid out, on meta or not.
        folder: that `migrator reshard --layout ranks` wrote for as many ranks as the process group has.
        device: where the tensors go.
        dtype: cast floating-point tensors to this one; by default they stay as stored.

    Raises:
        IncompleteError: the file is missing, or tensors of the model are missing from it.
        CheckpointError: it is a link that leads out of the folder.
        HeaderError: the file or the manifest lies.
        MismatchError: the file holds tensors the model lacks, or of other shapes than this rank's.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    path = folder / rank_file(rank, world_size)
    manifest = read_manifest(folder)
    if not path.is_file():
        raise IncompleteError(
            f"{path}: missing", hint=f"the folder must be laid out for {world_size} ranks", file=str(path)
        )
    check_contained(folder, path)
    stored = dict(read_header(path).tensors)
    for name, entry in manifest.tensors.items():
        if entry.kind == "carried" and held_by(entry, rank):
            stored.pop(name, None)
    slots = _slots(model, manifest.tied)
    # Before a byte is read: nothing is allocated but what the model itself holds.
    _check_names(slots, stored.keys(), str(path))
    for name, tensor in stored.items():
        _check_shape(name, tensor.shape, slots[name], str(path))
    _fill(model, slots, _read(path, stored), device, dtype)


def load_whole(
    model: nn.Module,
    tensors: Iterable[tuple[str, torch.Tensor]],
    tied: Iterable[str],
    *,
    dtype: torch.dtype | None = None,
) -> None:
    """Fill an unsharded model.

    Args:
        model: on meta or not.
        tensors: its parameters and persistent buffers by name, tied names left out.
        tied: those names.
        dtype: cast floating-point tensors to this one.

    Raises:
        IncompleteError: tensors of the model are missing.
        MismatchError: there are tensors the model lacks, or of other shapes.
    """
    slots = _slots(model, tied)
    filled: set[str] = set()

    def checked() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in tensors:
            if name not in slots:
                raise _unexpected([name], _SOURCE)
            _check_shape(name, tensor.shape, slots[name], _SOURCE)
            filled.add(name)
            yield name, tensor

    _fill(model, slots, checked(), "cpu", dtype)
    _check_names(slots, filled, _SOURCE)


def _fill(
    model: nn.Module,
    slots: Mapping[str, torch.Tensor],
    tensors: Iterable[tuple[str, torch.Tensor]],
    device: torch.device | str,
    dtype: torch.dtype | None,
) -> None:
    """Put each tensor wherever the model holds its slot, so that tied names stay tied."""
    holders = _holders(model)
    for name, tensor in tensors:
        cast = dtype if tensor.is_floating_point() else None
        new = _like(slots[name], tensor.to(device=device, dtype=cast))
        for table, key in holders[id(slots[name])]:
            table[key] = new


def _slots(model: nn.Module, tied: Iterable[str]) -> dict[str, torch.Tensor]:
    """Return the tensors that a checkpoint must fill, by name."""
    others = set(tied)
    return {name: tensor for name, tensor in model_tensors(model).items() if name not in others}


def _local_shape(tensor: torch.Tensor) -> torch.Size:
    with torch.no_grad():
        return tensor.to_local().shape if isinstance(tensor, DTensor) else tensor.shape


def _holders(model: nn.Module) -> dict[int, list[_Holder]]:
    """Return where the model holds each tensor, by its identity; tied names are several places of one tensor."""
    holders: defaultdict[int, list[_Holder]] = defaultdict(list)
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is not None:
                    holders[id(tensor)].append((table, name))
    return holders


def _like(old: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
    """Return what takes the place of `old` when its local tensor is `local`."""
    new = local
    if isinstance(old, DTensor):
        new = DTensor.from_local(
            local, old.device_mesh, old.placements, run_check=False, shape=old.shape, stride=old.stride()
        )
    return nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new


def _read(path: Path, stored: dict[str, StoredTensor]) -> Iterator[tuple[str, torch.Tensor]]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        for name, tensor in stored.items():
            if tensor.dtype not in DTYPES:
                raise CheckpointError(
                    f"{path}: {name!r} is {tensor.dtype}, which torch cannot hold", hint="use a newer torch"
                )
            content = torch.empty(tensor.size, dtype=torch.uint8)
            read_exactly(descriptor, content.numpy().data, tensor.offset, path)
            yield name, content.view(DTYPES[tensor.dtype]).reshape(tensor.shape)
    finally:
        os.close(descriptor)


def _check_shape(name: str, shape: Sequence[int], slot: torch.Tensor, source: str) -> None:
    if tuple(shape) != tuple(_local_shape(slot)):
        raise MismatchError(
            f"{source}: {name!r} is {list(shape)} where this rank holds {list(_local_shape(slot))}",
            hint="the checkpoint belongs to another model or mesh; reshard again",
            tensor=name,
        )


def _check_names(slots: Mapping[str, torch.Tensor], found: Set[str], source: str) -> None:
    if missing := sorted(slots.keys() - found):
        raise IncompleteError(
            f"{source}: no {listed(missing)}", hint="the checkpoint is incomplete; reshard again", tensors=missing
        )
    if unexpected := sorted(found - slots.keys()):
        raise _unexpected(unexpected, source)


def _unexpected(names: list[str], source: str) -> MismatchError:
    return MismatchError(
        f"{source}: holds {listed(names)}, which the model lacks",
        hint="the checkpoint belongs to another model; reshard again",
        tensors=names,
    )
