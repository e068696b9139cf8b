"""Torch's DTensor as the oracle of what a rank holds, and tensors gathered element by element."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate as TorchReplicate
from torch.distributed.tensor import Shard as TorchShard
from torch.distributed.tensor import distribute_tensor
from torch.distributed.tensor.placement_types import Placement as TorchPlacement
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

from plans.placement import Packed, Placement, Replicate, Shard
from runtime.tensor_map.tensor_map import TensorMap


def torch_placement(placement: Placement) -> TorchPlacement:
    match placement:
        case Replicate():
            return TorchReplicate()
        case Shard(dim):
            return TorchShard(dim)
        case Packed(dim, groups):
            return _StridedShard(dim, split_factor=groups)


@contextmanager
def fake_rank(rank: int, world_size: int) -> Iterator[None]:
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="session")
def dtensor_locals() -> Callable[[dict[str, torch.Tensor], dict[str, Sequence[Placement]], int, int], dict]:
    """Return a function that gives DTensor's local tensors of a rank on a one-axis mesh."""

    def locals_of(
        tensors: dict[str, torch.Tensor], placements: dict[str, Sequence[Placement]], rank: int, world_size: int
    ) -> dict[str, torch.Tensor]:
        with fake_rank(rank, world_size):
            mesh = init_device_mesh("cpu", (world_size,))
            return {
                name: distribute_tensor(
                    tensors[name], mesh, [torch_placement(placement) for placement in placed], src_data_rank=None
                ).to_local()
                for name, placed in placements.items()
            }

    return locals_of


@pytest.fixture(scope="session")
def gather() -> Callable[[TensorMap, dict[str, torch.Tensor]], torch.Tensor]:
    """Return a function that builds a form's tensor from its sources, element by element of each extent."""

    def gathered(form: TensorMap, sources: dict[str, torch.Tensor]) -> torch.Tensor:
        result = torch.full(form.shape, -1, dtype=torch.int64)
        for extent in form.boxes:
            dims = zip(extent.offset, extent.shape, extent.steps, strict=True)
            box = result[tuple(slice(offset, offset + count * step, step) for offset, count, step in dims)]
            assert bool((box == -1).all()), "two extents overlap"
            flat = sources[extent.source].reshape(-1)
            box.copy_(torch.as_strided(flat, extent.shape, extent.strides, extent.base))
        assert bool((result != -1).all()), "an element is covered by no extent"
        return result

    return gathered
