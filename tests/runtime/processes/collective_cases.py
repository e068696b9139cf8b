"""What tests let ranks do with collectives; module-level functions, so that process ranks can be sent them by name."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import _functional_collectives as functional
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from plans.mesh import Mesh
from runtime.parallel.mesh import device_meshes

REDUCTIONS = ("SUM", "PRODUCT", "MIN", "MAX", "BAND", "BOR", "BXOR")


def own(*sizes: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Return a tensor that differs on every rank."""
    generator = torch.Generator().manual_seed(dist.get_rank() + 1)
    if dtype == torch.int64:
        return torch.randint(0, 1 << 20, sizes, generator=generator)
    return torch.randn(sizes, generator=generator, dtype=dtype)


def reduced() -> dict[str, torch.Tensor]:
    found = {}
    for name in REDUCTIONS:
        dtype = torch.int64 if name.startswith("B") else torch.float64
        found[name] = own(3, 5, dtype=dtype)
        dist.all_reduce(found[name], getattr(dist.ReduceOp, name))
        to_one = own(2, 3, dtype=dtype)
        dist.reduce(to_one, 1, getattr(dist.ReduceOp, name))
        found[f"{name} to one"] = to_one if dist.get_rank() == 1 else torch.empty(0)
    return found


def moved() -> dict[str, Any]:
    """Broadcast, gather, scatter and exchange tensors, in lists and in single ones, evenly and unevenly."""
    rank, size = dist.get_rank(), dist.get_world_size()
    found: dict[str, Any] = {"broadcast": own(4)}
    dist.broadcast(found["broadcast"], 1)
    found["all_gather"] = [torch.empty(2, 3, dtype=torch.float64) for _ in range(size)]
    dist.all_gather(found["all_gather"], own(3, 2).T.contiguous())
    found["gather"] = [torch.empty(3, dtype=torch.float64) for _ in range(size)] if rank == 0 else None
    dist.gather(own(3), found["gather"], 0)
    found["scatter"] = torch.empty(2, dtype=torch.float64)
    dist.scatter(found["scatter"], [own(2) + number for number in range(size)] if rank == 1 else None, 1)
    found["single"] = torch.empty(size * 2, 3, dtype=torch.float64)
    dist.all_gather_into_tensor(found["single"], own(2, 3))
    found["reduce_scatter"] = torch.empty(2, 3, dtype=torch.float64)
    dist.reduce_scatter_tensor(found["reduce_scatter"], own(size * 2, 3))
    found["exchanged"] = torch.empty(size * 2, 3, dtype=torch.float64)
    dist.all_to_all_single(found["exchanged"], own(size * 2, 3))
    sent = [(rank + receiver) % 3 for receiver in range(size)]
    received = [(sender + rank) % 3 for sender in range(size)]
    found["uneven"] = torch.empty(sum(received), 2, dtype=torch.float64)
    dist.all_to_all_single(found["uneven"], own(sum(sent), 2), received, sent)
    dist.barrier()
    found["objects"] = [None] * size
    dist.all_gather_object(found["objects"], {"rank": rank})
    return found


def passed_on() -> list[torch.Tensor]:
    """Send tensors around the ranks, by two tags out of order and in a batch."""
    rank, size = dist.get_rank(), dist.get_world_size()
    after, before = (rank + 1) % size, (rank - 1) % size
    first, second, third = (torch.empty(3, dtype=torch.float64) for _ in range(3))
    sends = [dist.isend(own(3) * 10, after, tag=1), dist.isend(own(3), after, tag=2)]
    dist.recv(second, before, tag=2)
    dist.recv(first, before, tag=1)
    for send in sends:
        send.wait()
    swaps = [dist.P2POp(dist.isend, own(3), after), dist.P2POp(dist.irecv, third, before)]
    for work in dist.batch_isend_irecv(swaps):
        work.wait()
    return [first, second, third]


def in_groups() -> list[torch.Tensor]:
    """Reduce over groups that cross each other, one after the other and by functional collectives."""
    meshes = device_meshes(Mesh(tp=2, fsdp=dist.get_world_size() // 2), "cpu")
    found = []
    for axis in (meshes.axis("tp"), meshes.axis("fsdp"), meshes.axis("tp")):
        value = own(4)
        dist.all_reduce(value, group=axis.get_group())
        found.append(value)
        found.append(torch.as_tensor(functional.all_gather_tensor(own(2), 0, axis)) + 0)
        found.append(torch.as_tensor(functional.reduce_scatter_tensor(own(8), "sum", 0, axis)) + 0)
        found.append(torch.as_tensor(functional.all_to_all_single(own(4), None, None, axis.get_group())) + 0)
    return found


def of_dtensors() -> list[torch.Tensor]:
    """Redistribute a DTensor through every placement, uneven shards among them, and take its gradient."""
    axis = device_meshes(Mesh(tp=dist.get_world_size()), "cpu").axis("tp")
    whole = torch.arange(35, dtype=torch.float64).reshape(5, 7)
    found = []
    for start in ([Shard(0)], [Shard(1)], [Replicate()]):
        tensor = distribute_tensor(whole, axis, start).requires_grad_()
        for end in ([Shard(0)], [Shard(1)], [Replicate()]):
            found.append(tensor.redistribute(placements=end).to_local().detach())
        (tensor.redistribute(placements=[Shard(1)]) * 2).square().sum().full_tensor().backward()
        assert isinstance(tensor.grad, DTensor)
        found.append(tensor.grad.full_tensor())
    partial = DTensor.from_local(own(5, 7), axis, [Partial()])
    return [*found, partial.redistribute(placements=[Shard(0)]).to_local(), partial.full_tensor()]


def of_fsdp() -> list[torch.Tensor]:
    """Train a small model for two steps under FSDP2, each rank on a batch of its own."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 10), torch.nn.Tanh(), torch.nn.Linear(10, 3)).double()
    axis = device_meshes(Mesh(fsdp=dist.get_world_size()), "cpu").axis("fsdp")
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=axis)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    losses = []
    for _ in range(2):
        loss = model(own(4, 6)).square().sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return [*losses, *(parameter.full_tensor().detach() for parameter in model.parameters())]
