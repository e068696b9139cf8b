"""What tests let ranks do with pipeline stages; module-level functions, so that they can be sent by name."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from plans.errors import MigratorError
from plans.mesh import Mesh
from runtime import full_state_dict, load, parallelize, verify_sharding
from runtime.models.model import meta_model, model_tensors
from tests.runtime.rank_cases import eager_config, unsharded


def digest(tensor: torch.Tensor) -> str:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return hashlib.sha256(local.detach().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def tokens() -> torch.Tensor:
    return torch.randint(3, 101, (2, 12), generator=torch.Generator().manual_seed(3))


def loaded_by_the_release(folder: Path, tp: int = 1) -> tuple[dict[str, str], torch.Tensor]:
    """Let transformers load a folder as stages of `tp` ranks; return digests of what this one holds, and logits."""
    os.environ |= {"RANK": str(dist.get_rank()), "LOCAL_RANK": "0", "WORLD_SIZE": str(dist.get_world_size())}
    config = DistributedConfig(pp_size=dist.get_world_size() // tp, tp_size=tp)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, distributed_config=config, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(input_ids=tokens(), use_cache=False).logits
    return {name: digest(tensor) for name, tensor in model_tensors(model).items()}, logits


def stage(folder: Path, mesh: Mesh) -> Any:
    """Return this rank's part of a folder's model, loaded."""
    model = meta_model(eager_config(folder))
    resolved = parallelize(model, mesh)
    verify_sharding(model, resolved)
    result = load(model, folder)
    assert result.verified == (folder / "migrator.json").is_file()
    return model.eval()


def loaded(folder: Path, mesh: Mesh) -> tuple[dict[str, str], torch.Tensor]:
    """Load a folder; return the digest of what this rank holds, and logits."""
    model = stage(folder, mesh)
    with torch.no_grad():
        logits = model(tokens(), use_cache=False).logits
    return {name: digest(tensor) for name, tensor in model_tensors(model).items()}, logits


def logits_error(hub: Path, folder: Path, mesh: Mesh) -> float:
    """Return how far logits are from the unsharded model's, relative to the largest."""
    model = stage(folder, mesh)
    with torch.no_grad():
        expected = unsharded(hub)(input_ids=tokens()).logits
        found = model(input_ids=tokens(), use_cache=False).logits
    assert not found.requires_grad
    return float((found - expected).abs().max() / expected.abs().max())


def refusals(folder: Path, mesh: Mesh) -> list[str]:
    """Return what a stage refuses to do."""
    model = stage(folder, mesh)
    messages = []
    for attempt in (lambda: model(input_ids=tokens(), labels=tokens()), lambda: full_state_dict(model)):
        try:
            attempt()
        except MigratorError as error:
            messages.append(f"{error.message}\nhint: {error.hint}")
    return messages


def damaged(folder: Path, mesh: Mesh) -> str:
    """Load a damaged folder; return the error that this rank sees."""
    try:
        stage(folder, mesh)
    except MigratorError as error:
        return error.message
    return ""
