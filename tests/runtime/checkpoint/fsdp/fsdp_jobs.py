"""What an FSDP job does on each of its ranks: shard a model, and pickle the rank's part of its state dict."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
from safetensors.torch import load_file
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from tests.runtime.checkpoint.fsdp.rank_writer import build


def save_ranks(hub: Path, folder: Path, sizes: dict[str, int], how: str) -> None:
    """Save a model's rank files, as verl's checkpoint manager does; `how` names what differs between jobs."""
    if how == "under hub names":
        torch.save(shard_hub_form(hub, make_mesh(sizes)), folder / name_file())
        dist.barrier()
        return
    model = load_sharded(hub, sizes, how)
    with warnings.catch_warnings(action="ignore"):
        state = get_model_state_dict(model) if how == "with torch's getter" else model.state_dict()
    if how == "with a prefix":
        state = {f"model.{name}": tensor for name, tensor in state.items()}
    torch.save(state, folder / name_file())
    dist.barrier()


def name_file() -> str:
    return f"model_world_size_{dist.get_world_size()}_rank_{dist.get_rank()}.pt"


def shard_hub_form(hub: Path, mesh: DeviceMesh) -> dict[str, torch.Tensor]:
    """Return the shards of a model whose parameters have the names of the hub form, as those of transformers 4 had."""
    state: dict[str, torch.Tensor] = {}
    for path in sorted(hub.glob("*.safetensors")):
        state |= load_file(path)
    module = build(state)
    fully_shard(module, mesh=mesh)
    return dict(module.state_dict())


def save_hub_names(hub: Path, folder: Path) -> None:
    """Save such a model as torch's distributed checkpoint in safetensors."""
    state = shard_hub_form(hub, init_device_mesh("cpu", (dist.get_world_size(),)))
    dcp.save(state, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
    dist.barrier()


def save_whole(hub: Path, folder: Path, sizes: dict[str, int], how: str) -> None:
    """Gather a sharded model as torch does, and let one rank save all of it."""
    model = load_sharded(hub, sizes, how)
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        torch.save(state, folder / "pytorch_model.bin")
    dist.barrier()


def load_sharded(hub: Path, sizes: dict[str, int], how: str) -> torch.nn.Module:
    model: torch.nn.Module = transformers.AutoModelForCausalLM.from_pretrained(
        hub, dtype="auto", tie_word_embeddings=False
    )
    shard(model, make_mesh(sizes), how)
    return model


def make_mesh(sizes: dict[str, int]) -> DeviceMesh:
    return init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))


def shard(model: torch.nn.Module, mesh: DeviceMesh, how: str) -> None:
    if how == "over tensor parallelism":
        columns = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
        for name, module in list(model.named_modules()):
            if name.endswith(columns):
                parallelize_module(model, mesh["tp"], {name: ColwiseParallel()})
            elif name.endswith(("o_proj", "down_proj")) and isinstance(module, torch.nn.Linear):
                parallelize_module(model, mesh["tp"], {name: RowwiseParallel()})
        mesh = mesh["fsdp"]
    elif how == "replicas apart":
        mesh = mesh["fsdp"]
    if how != "as one group":
        for layer in model.model.layers:  # type: ignore[union-attr]
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    if how == "compiled":
        layers = model.model.layers  # type: ignore[union-attr]
        layers[1] = torch.compile(layers[1])  # compiled when it is called, which it is not


def save_optimizer(hub: Path, folder: Path, how: str) -> None:
    """Train two steps with AdamW and save model and optimizer as verl does, and what torch calls each state."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = transformers.AutoModelForCausalLM.from_pretrained(hub, dtype="auto", tie_word_embeddings=False)
    shard(model, mesh, "")
    parameters = list(model.parameters())
    if how == "one frozen":  # the only one of its shape
        model.lm_head.weight.requires_grad_(False)
        model.model.embed_tokens.weight.requires_grad_(True)
        parameters = [parameter for parameter in parameters if parameter.requires_grad]
    groups = [{"params": parameters}]
    if how == "decay apart":
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
        ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    for _ in range(2):
        model(torch.arange(8)[None]).logits.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    with warnings.catch_warnings(action="ignore"):
        torch.save(model.state_dict(), folder / name_file())
        torch.save(optimizer.state_dict(), folder / name_file().replace("model", "optim"))
        options = StateDictOptions(full_state_dict=True, flatten_optimizer_state_dict=True)
        named = get_optimizer_state_dict(model, optimizer, options=options)
    if dist.get_rank() == 0:
        torch.save(named, folder.parent / "expected.pt")
    dist.barrier()
