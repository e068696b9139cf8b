"""The model that is right by definition: unsharded on rank 0, or where that does not fit, over pure data parallelism.

Spread so, every rank still computes whole layers by the model's own code; torch gathers each layer's weights before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from plans.errors import CheckpointError, IncompleteError, MigratorError, MismatchError
from plans.mesh import Mesh
from plans.text import first_line
from runtime.checkpoint.open import detect_layout
from runtime.loader.loading import load
from runtime.models.config import read_config
from runtime.models.model import find_model_class, meta_model
from runtime.parallel.mesh import device_meshes
from runtime.parallel.parallelize import parallelize
from runtime.planning.plan import Plan
from runtime.processes.agreement import all_gather_json, raise_on_any_rank
from runtime.validation.run_on_all_ranks import RankFailure, run_on_all_ranks

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["ReferenceModel", "convert_reference_errors", "load_reference", "read_config_with_dtype"]

Result = TypeVar("Result")

_SOURCE_HINT = "give the checkpoint that the folder was resharded from as the reference"


@dataclass(frozen=True)
class ReferenceModel:
    """A reference as one rank has it.

    Args:
        model: None on other ranks than 0 where it is not spread.
        is_sharded: whether every rank has a part of it.
        device: where this rank computes.
    """

    model: PreTrainedModel | None
    is_sharded: bool
    device: torch.device

    @property
    def description(self) -> str:
        """What it is."""
        return f"the model over fsdp={dist.get_world_size()}" if self.is_sharded else "the unsharded model"

    def run(self, compute: Callable[[PreTrainedModel], Result]) -> Result | RankFailure[Result | None] | None:
        """Let it compute, and return what it does, None on ranks that have none of it; every rank calls this."""
        model = self.model
        return run_on_all_ranks(lambda: compute(model) if model is not None else None)

    def broadcast(self, tensor: torch.Tensor | None) -> torch.Tensor:
        """Return on every rank what only rank 0 may have; every rank calls this."""
        if self.is_sharded:
            assert tensor is not None
            return tensor
        (shape, dtype), *_ = all_gather_json(
            (list(tensor.shape), str(tensor.dtype)) if tensor is not None else (None, None)
        )
        kind = getattr(torch, dtype.removeprefix("torch."))
        shared = torch.empty(shape, dtype=kind, device=self.device) if tensor is None else tensor.contiguous()
        dist.broadcast(shared, src=0)
        return shared

    def broadcast_gradient(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Return a parameter's whole gradient, zeros where there is none, on every rank; every rank calls this."""
        found = None
        if self.model is not None:
            gradient = dict(self.model.named_parameters(remove_duplicate=False))[name].grad
            found = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
            found = torch.zeros(shape, device=self.device) if found is None else found.float().contiguous()
        if self.is_sharded:
            assert found is not None
            return found
        shared = torch.empty(shape, device=self.device) if found is None else found
        dist.broadcast(shared, src=0)
        return shared


def read_config_with_dtype(folder: Path, dtype: torch.dtype) -> PreTrainedConfig:
    """Read a config to be compared in a type."""
    config = read_config(folder)
    config.dtype = dtype
    return config


def load_reference(folder: Path, dtype: torch.dtype, device: torch.device, *, sharded: bool) -> ReferenceModel:
    """Load a reference; every rank calls this.

    Args:
        folder: of whatever layout.
        dtype: that floating point tensors are cast to.
        device: where this rank computes.
        sharded: over the ranks, in place of whole on rank 0.

    Raises:
        CheckpointError: it cannot be loaded, or is incomplete.
        UsageError: it is quantized.
    """
    with convert_reference_errors():
        if sharded:
            return ReferenceModel(_load_sharded(folder, dtype, device), True, device)
        is_first = dist.get_rank() == 0
        model = raise_on_any_rank(lambda: _load_whole(folder, dtype, device) if is_first else None)
        return ReferenceModel(model, False, device)


@contextmanager
def convert_reference_errors() -> Iterator[None]:
    """Let what is wrong with a reference be no finding of the checkpoint's: nothing can be held against it.

    Raises:
        CheckpointError: its files contradict one another or lack parts of tensors.
    """
    try:
        yield
    except MigratorError as error:
        if isinstance(error, MismatchError) or "lossy" in error.data:
            raise CheckpointError(f"the reference is damaged: {error.message}", hint=_SOURCE_HINT) from error
        raise


def _load_sharded(folder: Path, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    mesh = Mesh(fsdp=dist.get_world_size())
    model = raise_on_any_rank(lambda: meta_model(read_config_with_dtype(folder, dtype)))
    parallelize(model, device_meshes(mesh, device.type), Plan("tp", {}))
    load(model, folder, dtype=dtype, device=device)
    return model


def _load_whole(folder: Path, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    if detect_layout(folder) == "hf":
        return _load_pretrained(folder, dtype, device)
    model = meta_model(read_config_with_dtype(folder, dtype))
    load(model, folder, dtype=dtype, device=device)
    return model


def _load_pretrained(folder: Path, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Load a hub-form checkpoint as transformers does; nothing is unpickled, and nothing may stay at random."""
    config = read_config_with_dtype(folder, dtype)
    load: Callable[..., Any] = find_model_class(config).from_pretrained
    try:
        model, report = load(
            folder,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except Exception as error:  # What transformers raises as it loads is not ours to list.
        raise IncompleteError(
            f"{folder}: transformers cannot load it: {first_line(error)}", hint=_SOURCE_HINT
        ) from error
    if missing := sorted(report["missing_keys"]):
        raise IncompleteError(
            f"{folder}: the reference lacks {missing[0]!r}", hint="give a complete checkpoint", tensors=missing
        )
    loaded: PreTrainedModel = model.to(device).eval()
    return loaded
