"""What tests let ranks do with optimizers: train, save as transformers does, load on another mesh and train on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers.distributed import load_optimizer_distributed, save_optimizer_distributed

from tests.runtime.released.bridge_cases import load

Sizes = Mapping[str, int]


def train(
    model_folder: Path, sizes: Sizes, steps: range, load_from: Path | None = None, save_to: Path | None = None
) -> list[float]:
    """Train a checkpoint on a mesh, going on from an optimizer's state, and save both; return the losses.

    Args:
        model_folder: of the model.
        sizes: of the mesh, as transformers names them.
        steps: numbers of the steps, by which their batches are chosen, the same on every rank.
        load_from: where the optimizer's state is.
        save_to: an empty folder for the model; the optimizer's state goes there too.
    """
    model = load(model_folder, **sizes).train()
    optimizer = _adamw(model)
    if load_from is not None:
        load_optimizer_distributed(model, optimizer, str(load_from))
    losses = [_step(model, optimizer, number) for number in steps]
    if save_to is not None:
        model.save_pretrained(save_to, distributed_checkpoint=True)
        save_optimizer_distributed(model, optimizer, str(save_to))
    dist.barrier()
    return losses


def _adamw(model: Any) -> torch.optim.Optimizer:
    """Return AdamW with parameters of one kind of mesh to a group; one group's tensors are updated together."""
    groups: defaultdict[object, list[torch.nn.Parameter]] = defaultdict(list)
    for parameter in model.parameters():
        groups[parameter.device_mesh if isinstance(parameter, DTensor) else None].append(parameter)
    return torch.optim.AdamW([{"params": group} for group in groups.values()], lr=1e-2, weight_decay=0.1)


def _step(model: Any, optimizer: torch.optim.Optimizer, number: int) -> float:
    generator = torch.Generator().manual_seed(number)
    tokens = torch.randint(0, model.config.vocab_size, (2, 16), generator=generator)
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss)
