"""Saves rank files with the torch of the Python that runs it: `rank_writer.py STATE FOLDER DDP FSDP`."""

from __future__ import annotations

import os
import sys
import tempfile

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


def build(state: dict[str, torch.Tensor]) -> nn.Module:
    """Return a module with these parameters."""
    root = nn.Module()
    for name, tensor in state.items():
        owner = root
        *path, last = name.split(".")
        for part in path:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        owner.register_parameter(last, nn.Parameter(tensor, requires_grad=False))
    return root


def save(rank: int, state: str, folder: str, ddp: int, fsdp: int, meeting: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=ddp * fsdp)
    mesh = init_device_mesh("cpu", (ddp, fsdp), mesh_dim_names=("ddp", "fsdp"))
    module = build(torch.load(state, weights_only=True))
    # Replicas with a mesh of their own, and with the mesh of all.
    fully_shard(module, mesh=mesh["fsdp"] if ddp == 1 else mesh)
    path = os.path.join(folder, f"model_world_size_{ddp * fsdp}_rank_{rank}.pt")  # noqa: PTH118
    torch.save(module.state_dict(), path)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    state, folder, ddp, fsdp = sys.argv[1:]
    with tempfile.TemporaryDirectory() as meeting:
        arguments = (state, folder, int(ddp), int(fsdp), f"{meeting}/store")
        torch.multiprocessing.spawn(save, arguments, nprocs=int(ddp) * int(fsdp))
