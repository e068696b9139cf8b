"""The reference model, right by definition: unsharded on rank 0, or if that does not fit, sharded by FSDP alone.

Under FSDP every rank still computes whole layers with the model's own code, on weights that torch gathers per layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from plans.errors import CheckpointError, IncompleteError, MigratorError, MismatchError, UsageError
from plans.mesh import Mesh
from plans.text import first_line, format_names
from runtime.checkpoint.files.job_folders import find_config_folder
from runtime.checkpoint.open import detect_layout, open_checkpoint
from runtime.loader.loading import load
from runtime.models.config import find_quantization, read_config, remove_quantization
from runtime.models.model import find_model_class, meta_model
from runtime.parallel.mesh import device_meshes
from runtime.parallel.parallelize import parallelize
from runtime.planning.plan import Plan
from runtime.processes.agreement import all_gather_json, raise_on_any_rank
from runtime.validation.dequantized import find_cut_weight, find_quantization_method, load_dequantized
from runtime.validation.run_on_all_ranks import RankFailure, run_on_all_ranks

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["ReferenceModel", "convert_reference_errors", "load_reference", "read_config_with_dtype"]

Result = TypeVar("Result")

_SOURCE_HINT = "pass the checkpoint that the folder was resharded from as the reference"
_OTHER_HINT = "pass the checkpoint that the folder was resharded from as the reference, or none"


@dataclass(frozen=True)
class ReferenceModel:
    """One rank's view of the reference.

    Args:
        model: the model; None on ranks other than 0 if it is not sharded.
        is_sharded: whether the model is sharded over all ranks.
        device: the device that this rank computes on.
        reading: who read its weights, in words: a reading of our own shares its mistakes with what it is compared to.
    """

    model: PreTrainedModel | None
    is_sharded: bool
    device: torch.device
    reading: str

    @property
    def description(self) -> str:
        """What the reference is, in words."""
        return f"the model over fsdp={dist.get_world_size()}" if self.is_sharded else "the unsharded model"

    def run(self, compute: Callable[[PreTrainedModel], Result]) -> Result | RankFailure[Result | None] | None:
        """Run a computation on the reference and return its result, None on ranks without a model. Collective."""
        model = self.model
        return run_on_all_ranks(lambda: compute(model) if model is not None else None)

    def broadcast(self, tensor: torch.Tensor | None) -> torch.Tensor:
        """Return a tensor that only rank 0 may have on every rank. Collective."""
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

    def broadcast_gradient(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return a parameter's whole gradient on every rank, zeros if it has none. Collective."""
        if self.model is None:
            whole = torch.empty(shape, device=self.device, dtype=dtype)
        else:
            gradient = dict(self.model.named_parameters(remove_duplicate=False))[name].grad
            gradient = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
            zeros = torch.zeros(shape, device=self.device, dtype=dtype)
            whole = zeros if gradient is None else gradient.to(dtype).contiguous()
        if not self.is_sharded:
            dist.broadcast(whole, src=0)
        return whole


def read_config_with_dtype(folder: Path, dtype: torch.dtype) -> PreTrainedConfig:
    """Read the config of the model that runs: in a dtype, and unquantized."""
    config = read_config(find_config_folder(folder))
    config.dtype = dtype
    remove_quantization(config)
    return config


def load_reference(folder: Path, dtype: torch.dtype, device: torch.device, *, sharded: bool) -> ReferenceModel:
    """Load a reference. Collective: every rank must call it.

    Args:
        folder: the reference's folder, of any layout.
        dtype: the dtype that floating point tensors are cast to.
        device: the device that this rank computes on.
        sharded: whether to shard it over the ranks instead of loading it whole on rank 0.

    Raises:
        CheckpointError: the reference cannot be loaded, or is incomplete.
        UsageError: the reference is quantized, and does not fit whole.
    """
    with convert_reference_errors():
        if sharded:
            raise_on_any_rank(lambda: _refuse_quantized(folder))
            reading = "migrator alone, because the model does not fit on one rank"
            return ReferenceModel(_load_sharded(folder, dtype, device), True, device, reading)
        is_first = dist.get_rank() == 0
        obstacle, turned = raise_on_any_rank(lambda: _inspect_source(folder))
        load_model = _load_whole if obstacle else _load_pretrained
        model = raise_on_any_rank(lambda: load_model(folder, dtype, device) if is_first else None)
        if obstacle:
            return ReferenceModel(model, False, device, f"migrator alone, because {obstacle}")
        if model is not None:
            _transpose(model, turned)
        return ReferenceModel(model, False, device, _describe_reading(turned))


def _refuse_quantized(folder: Path) -> None:
    if find_quantization_method(folder):
        raise UsageError(
            f"{folder}: its dequantized model does not fit in memory whole",
            hint="validate it whole, on a machine with more memory",
            folder=str(folder),
        )


def _inspect_source(folder: Path) -> tuple[str, tuple[str, ...]]:
    """Return why transformers cannot load a checkpoint, or else the tensors that it loads in the wrong orientation."""
    layout = detect_layout(folder)
    if layout != "hf":
        return f"transformers does not read the layout {layout}", ()
    checkpoint = open_checkpoint(folder).read_headers()
    if any(chunk.file.suffix != ".safetensors" for chunk in checkpoint.chunks.values()):
        return "transformers would unpickle the weights", ()
    if find_quantization_method(folder) and (name := find_cut_weight(folder)):
        return f"transformers dequantizes whole blocks only, and the last one of {name} is cut short", ()
    return "", checkpoint.reoriented


@contextmanager
def convert_reference_errors() -> Iterator[None]:
    """Convert mismatches within a reference into errors, because they say nothing about the checkpoint.

    Raises:
        CheckpointError: the reference's files contradict each other, or lack parts of tensors.
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
    load(model, folder, dtype=dtype, device=device, verify=False)  # the content check does that
    return model


def _load_whole(folder: Path, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    model = meta_model(read_config_with_dtype(folder, dtype))
    if find_quantization_method(folder):
        load_dequantized(model, folder, dtype, device)
    else:
        load(model, folder, dtype=dtype, device=device, verify=False)  # the content check does that
    return model


@torch.no_grad()
def _transpose(model: PreTrainedModel, names: Sequence[str]) -> None:
    """Transpose square tensors that transformers leaves as they are stored, whatever lies beside them."""
    for name in names:
        parameter = model.get_parameter(name)
        parameter.copy_(parameter.transpose(-2, -1).clone())


def _describe_reading(turned: Sequence[str]) -> str:
    return "transformers" + (f"; {format_names(turned)} transposed, as those beside them are" if turned else "")


def _load_pretrained(folder: Path, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Load a hub-form checkpoint through transformers, without unpickling, and refuse missing weights."""
    config = read_config(folder)
    config.dtype = dtype
    if (quantization := find_quantization(config)) is not None:
        config.quantization_config = {**quantization[1], "dequantize": True}
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
    except Exception as error:  # transformers raises errors of many kinds while loading
        raise IncompleteError(
            f"{folder}: transformers cannot load it: {first_line(error)}", hint=_OTHER_HINT
        ) from error
    if missing := sorted(report["missing_keys"]):
        raise IncompleteError(
            f"{folder}: transformers loads it without {format_names(missing)}",
            hint=_OTHER_HINT,
            tensors=missing,
        )
    # Some classes keep parameters in float32 whatever dtype is asked for, and with them their gradients.
    loaded: PreTrainedModel = model.to(device, dtype if dtype == torch.float64 else None).eval()
    return loaded
