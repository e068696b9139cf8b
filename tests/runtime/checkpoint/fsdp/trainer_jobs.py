"""What Trainer does on each rank of an FSDP job when it saves: accelerate's own functions write model and optimizer."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
import transformers
from accelerate.utils import FullyShardedDataParallelPlugin, fsdp_utils
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


def save_checkpoint(hub: Path, folder: Path, kind: str) -> None:
    """Shard a model, train a step with AdamW, and save both as `Trainer` does in `checkpoint-N`."""
    model = transformers.AutoModelForCausalLM.from_pretrained(hub, dtype="auto", tie_word_embeddings=False)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    model(torch.arange(8)[None]).logits.sum().backward()
    optimizer.step()
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type=kind)
    accelerator = SimpleNamespace(
        process_index=dist.get_rank(), num_processes=dist.get_world_size(), wait_for_everyone=dist.barrier
    )
    fsdp_utils.logger = logging.getLogger("accelerate")  # its own asks for a state that would start a second group
    fsdp_utils.save_fsdp_model(plugin, accelerator, model, str(folder))
    fsdp_utils.save_fsdp_optimizer(plugin, accelerator, optimizer, model, str(folder))
    dist.barrier()
