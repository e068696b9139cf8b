"""Rank files put together by torch's own cuts, as their manifest says: the oracle of what was written."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from plans.mesh import Mesh
from plans.placement import Packed, Placement, Shard
from runtime.checkpoint.manifest import ManifestEntry, read_manifest

# By the bytes of an element: integers of every width can be put in their places, small floats cannot.
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def assembled(folder: Path) -> dict[str, torch.Tensor]:
    """Return the whole parameters and buffers of rank files; all copies of an element must be the same."""
    manifest = read_manifest(folder)
    size = manifest.mesh.world_size
    held = [load_file(folder / f"rank-{rank:05d}-of-{size:05d}.safetensors") for rank in range(size)]
    return {
        name: _whole(manifest.mesh, entry, [tensors[name] for tensors in held])
        for name, entry in manifest.tensors.items()
        if entry.kind != "carried"
    }


def _whole(mesh: Mesh, entry: ManifestEntry, held: list[torch.Tensor]) -> torch.Tensor:
    bits = [tensor.reshape(-1).view(_INTEGERS[tensor.element_size()]) for tensor in held]
    count = torch.Size(entry.shape).numel()
    whole, written = torch.zeros(count, dtype=bits[0].dtype), torch.zeros(count, dtype=torch.bool)
    for rank, local in enumerate(bits):
        places = torch.arange(count).reshape(entry.shape)
        axes = zip(entry.placements, mesh.sizes(entry.mesh), mesh.coordinates(entry.mesh, rank), strict=True)
        for placement, size, coordinate in reversed(list(axes)):
            places = _part(places, placement, size, coordinate)
        flat = places.reshape(-1)
        again = written[flat]
        assert torch.equal(whole[flat][again], local[again]), f"rank {rank} holds another copy"
        whole[flat], written[flat] = local, True
    assert written.all()
    return whole.view(held[0].dtype).reshape(entry.shape)


def _part(places: torch.Tensor, placement: Placement, size: int, coordinate: int) -> torch.Tensor:
    if isinstance(placement, Shard):
        parts = torch.chunk(places, size, placement.dim)
        return parts[coordinate] if coordinate < len(parts) else places.narrow(placement.dim, 0, 0)
    if isinstance(placement, Packed):
        groups = torch.chunk(places, placement.groups, placement.dim)
        return torch.cat([torch.chunk(group, size, placement.dim)[coordinate] for group in groups], placement.dim)
    return places
