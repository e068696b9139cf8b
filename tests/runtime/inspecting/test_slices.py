"""Slices of tensors by rank, compared with torch's own chunks of a tensor of coordinates."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from plans.mesh import Mesh
from plans.placement import Packed, Placement, Replicate, Shard
from runtime.inspecting.placement import compute_local_bytes, find_slices


def shard(tensor: torch.Tensor, placement: Placement, size: int, index: int) -> torch.Tensor:
    """Return a rank's shard by torch's own operations."""
    match placement:
        case Shard(dim):
            chunks = tensor.chunk(size, dim)
            return chunks[index] if index < len(chunks) else tensor.narrow(dim, 0, 0)
        case Packed(dim, groups):
            return torch.cat([part.chunk(size, dim)[index] for part in tensor.chunk(groups, dim)], dim)
    return tensor


@st.composite
def cases(draw):
    mesh = Mesh(tp=draw(st.integers(1, 4)), fsdp=draw(st.integers(1, 4)), replicate=draw(st.integers(1, 3)))
    shape = draw(st.lists(st.integers(1, 7), min_size=2, max_size=3))
    inner = draw(st.sampled_from([Replicate(), Shard(0), Shard(1), Packed(1, 2)]))
    if isinstance(inner, Packed):
        shape[1] = 2 * mesh.tp * draw(st.integers(1, 3))
    return mesh, tuple(shape), (draw(st.sampled_from([Replicate(), Shard(0)])), inner)


@given(cases())
def test_each_rank_holds_the_elements_of_its_slices(case):
    mesh, shape, placements = case
    whole = torch.arange(torch.Size(shape).numel()).reshape(shape)
    sizes, local_bytes = mesh.sizes("dense"), compute_local_bytes("I64", shape, placements, mesh, "dense")
    slices = find_slices(shape, placements, mesh, "dense")
    assert list(slices) == sorted(slices, key=lambda box: box.bounds)
    for rank in range(mesh.world_size):
        order = torch.arange(mesh.world_size).reshape(mesh.replicate, mesh.fsdp, mesh.tp)
        _, outer, inner = (order == rank).nonzero()[0].tolist()
        local = shard(shard(whole, placements[1], sizes[1], inner), placements[0], sizes[0], outer)
        boxes = [box.bounds for box in slices if rank in box.ranks]
        elements = [whole[tuple(slice(*bound) for bound in box)].reshape(-1) for box in boxes]
        joined = torch.cat(elements) if elements else whole.reshape(-1)[:0]
        assert sorted(joined.tolist()) == sorted(local.reshape(-1).tolist())
        assert local_bytes[rank] == local.numel() * 8


def test_gate_and_up_are_separate_slices():
    slices = find_slices((2, 8, 3), (Replicate(), Packed(1, 2)), Mesh(tp=2), "dense")
    assert [(box.bounds[1], box.ranks) for box in slices] == [
        ((0, 2), (0,)),
        ((2, 4), (1,)),
        ((4, 6), (0,)),
        ((6, 8), (1,)),
    ]


def test_a_replicated_tensor_is_one_slice_held_by_every_rank():
    (box,) = find_slices((5,), (Replicate(), Replicate()), Mesh(tp=2, fsdp=2), "dense")
    assert box.ranks == (0, 1, 2, 3)
    assert find_slices((), (Replicate(), Replicate()), Mesh(tp=2), "dense")[0].bounds == ()
    assert find_slices((0, 4), (Replicate(), Shard(0)), Mesh(tp=2), "dense") == ()
