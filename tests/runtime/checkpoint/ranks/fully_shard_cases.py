"""What `fully_shard` leaves on a rank of tensors that tensor parallelism has cut, beside our own form of it."""

from __future__ import annotations

import random
from math import prod

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from plans.mesh import Mesh
from plans.placement import Packed, Placement, Replicate, Shard
from runtime.styles.placements import as_parameter, cut_local_shard
from runtime.tensor_map.tensor_map import shard_for_rank, whole

SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 9, 12)


def differences(seed: int, count: int, sizes: tuple[int, int], replicate: int = 1) -> list[str]:
    """Return the tensors whose local elements differ; sizes are those of the fsdp and tp axes."""
    outer = {"replicate": replicate} if replicate > 1 else {}
    mesh = init_device_mesh("cpu", (*outer.values(), *sizes), mesh_dim_names=(*outer, "fsdp", "tp"))
    module = nn.Module()
    cases = list(drawn(random.Random(seed), count, *sizes))
    for number, (shape, inner) in enumerate(cases):
        whole_tensor = torch.arange(float(prod(shape))).reshape(shape)
        local = cut_local_shard(whole_tensor, inner, sizes[1], mesh["tp"].get_local_rank())
        parameter = (
            nn.Parameter(local)
            if isinstance(inner, Replicate)
            else as_parameter(local, whole_tensor.shape, inner, mesh["tp"], requires_grad=True)
        )
        module.register_parameter(f"p{number}", parameter)
    fully_shard(module, mesh=mesh["replicate", "fsdp"] if outer else mesh["fsdp"])
    described = Mesh(tp=sizes[1], fsdp=sizes[0], replicate=replicate)
    coordinates = described.coordinates("dense", dist.get_rank())
    found: list[str] = []
    for (shape, inner), parameter in zip(cases, module.parameters(), strict=True):
        assert isinstance(parameter, DTensor)
        form = shard_for_rank(whole("t", shape), [Shard(0), inner], sizes, coordinates)
        expected = torch.full(form.shape, -1.0)
        for extent in form.boxes:
            box = expected[tuple(slice(o, o + n) for o, n in zip(extent.offset, extent.shape, strict=True))]
            box.copy_(torch.arange(float(prod(shape))).as_strided(extent.shape, extent.strides, extent.base))
        local = parameter.to_local()
        # Of a tensor that tensor parallelism left empty, torch keeps no elements in a shape of its own.
        if not (torch.equal(local, expected) or local.numel() == expected.numel() == 0):
            found.append(f"{list(shape)} as {inner} on rank {dist.get_rank()}: {list(local.shape)}")
    return found


def drawn(source: random.Random, count: int, fsdp: int, tp: int) -> list[tuple[tuple[int, ...], Placement]]:
    """Draw shapes, uneven and small ones too, each with a placement that they can have on the tp axis."""
    cases: list[tuple[tuple[int, ...], Placement]] = []
    while len(cases) < count:
        shape = tuple(source.choice(SIZES) for _ in range(source.randint(1, 3)))
        first = 0 if fsdp == 1 else 1  # FSDP would cut across groups along dim 0
        packed = [Packed(dim, 2) for dim in range(first, len(shape)) if shape[dim] % (2 * tp) == 0]
        choices: list[Placement] = [Replicate(), *(Shard(dim) for dim in range(len(shape))), *packed]
        inner = source.choice(choices)
        cases.append((shape, inner))
    return cases
