"""What tests let ranks do with distributed checkpoints: transformers and torch write them and load them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from tests.runtime.released.bridge_cases import load, local


def save_with_transformers(source: Path, folder: Path, sizes: dict[str, int]) -> None:
    """Load a checkpoint distributed and save it so, as a training run does."""
    load(source, **sizes).save_pretrained(folder, distributed_checkpoint=True)


def differing(one: Path, other: Path, sizes: dict[str, int]) -> list[str]:
    """Return the tensors that a rank holds differently after loading two checkpoints with transformers."""
    first, second = (load(folder, **sizes).state_dict() for folder in (one, other))
    assert first.keys() == second.keys()
    return [name for name, tensor in first.items() if not torch.equal(local(tensor), local(second[name]))]


def wrong_after_torch_load(folder: Path, source: Path, world_size: int) -> list[str]:
    """Load a checkpoint with torch into tensors sharded along their last dim; return those that another has not."""
    expected = load(source).state_dict()
    mesh = init_device_mesh("cpu", (world_size,))
    state: dict[str, Any] = {
        name: distribute_tensor(torch.full_like(tensor, -7), mesh, [Shard(tensor.ndim - 1)])
        for name, tensor in expected.items()
    }
    dcp.load(state, storage_reader=HuggingFaceStorageReader(str(folder)))
    found = {name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for name, tensor in state.items()}
    return [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)]


def save_with_torch(source: Path, folder: Path, form: str) -> None:
    """Shard a model with FSDP and save it with torch, alone or with other state beside it."""
    model = load(source)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    state = get_model_state_dict(model)
    match form:
        case "plain":
            dcp.save(state, checkpoint_id=folder)
        case "nested":
            optimizer = {"state": {name: {"exp_avg": torch.zeros_like(local(t))} for name, t in state.items()}}
            dcp.save({"model": state, "optimizer": optimizer, "step": 3}, checkpoint_id=folder)
        case "safetensors":
            dcp.save(state, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
        case "replicas":
            whole = {name: tensor.full_tensor() for name, tensor in state.items()}
            rank = torch.distributed.get_rank()
            folder.mkdir(exist_ok=True)
            save_file(_own(whole), folder / f"shard-{rank + 1:05d}-model-00001-of-00001.safetensors", {"format": "pt"})
    torch.distributed.barrier()


def _own(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in state.items()}
