"""Checkpoints into models: every rank reads the bytes that it owns, from any layout, straight to where they belong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from plans.errors import UsageError
from plans.gc_paused import gc_paused
from runtime.checkpoint.checkpoint import Checkpoint
from runtime.hub import resolve_folder
from runtime.loader.memory import ModelMemory, check_cast, check_dtype, prepare_memory
from runtime.loader.non_persistent import rebuild_non_persistent
from runtime.loader.parameter_refs import default_device, find_parameter_refs, mesh_axes
from runtime.loader.replicated import assign_readers, broadcast_tensors
from runtime.loader.sources import find_source
from runtime.loader.transfer import default_threads, transfer
from runtime.processes.agreement import raise_on_any_rank

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["load"]

Result = TypeVar("Result")


def load(
    model: PreTrainedModel,
    checkpoint: str | Path | Checkpoint,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    threads: int | None = None,
    every_copy: bool = False,
) -> None:
    """Fill a model from a checkpoint, in place; of a parallel model every rank calls this.

    A rank reads the ranges of files that hold its own tensors: its own file where rank files are laid out as the model
    is, its slices of all others. A model on meta gets memory for what it holds and no more; one in memory is filled
    where it is. Tied weights stay tied. Buffers that no checkpoint stores, tables of rotary positions say, get the
    values of a model newly built from the same config, whatever was there; what such a model has not, or in another
    shape, keeps its own. Tensors that a checkpoint carries along for no parameter are passed over.

    What the files hold is read as it is, and no digest is checked: `migrator verify` and `migrator validate` do that.

    Args:
        model: parallel or not, on meta or in memory.
        checkpoint: a folder of any layout, `hf://owner/name`, or what was read of one.
        dtype: what floating-point tensors are cast to, on their device, but for those that transformers'
            `from_pretrained` leaves in a wider type, unless FSDP shards them, which takes one type only. By default a
            model on meta gets what is stored, and one in memory keeps its own.
        device: where a model on meta goes; by default to the device of its mesh.
        threads: that read at once; by default this rank's share of the processors.
        every_copy: whether each rank reads for itself what all hold whole, where one could send it to the others.

    Raises:
        IncompleteError: files, or tensors of the model, are missing.
        MismatchError: the checkpoint holds tensors the model lacks, or of other shapes or kinds than the model's.
        CheckpointError: it is damaged, or stored tensors do not make the model's by operations that are known.
        UsageError: it is quantized, a tensor has no place in memory, or an argument makes no sense.
        WorkerError: another rank died.
    """
    slots = find_parameter_refs(model)

    def transfer_own_tensors() -> tuple[ModelMemory, dict[str, int]]:
        _check_threads(threads)
        check_dtype(dtype)
        fresh = rebuild_non_persistent(model, slots, dtype)
        check_cast(dtype, slots, fresh.kept_dtypes)
        place = torch.device(device) if device is not None else default_device(slots.values())
        source = find_source(_resolve_checkpoint(checkpoint), model, slots)
        memory = prepare_memory(model, slots, source, place, dtype, fresh)
        dealt = {} if every_copy else assign_readers(slots, memory.local_tensors)
        own = [name for name in slots if name not in dealt or dealt[name] == dist.get_rank()]
        transfer(source, memory.local_tensors, own, threads or default_threads())
        return memory, dealt

    with gc_paused():
        memory, dealt = _run_on_all_ranks(transfer_own_tensors, mesh_axes(slots.values()))
    broadcast_tensors(dealt, memory.local_tensors)
    memory.install(model)


def _run_on_all_ranks(stage: Callable[[], Result], axes: Sequence[DeviceMesh]) -> Result:
    """Run a stage; where several ranks hold a model together, all fail if one does."""
    return raise_on_any_rank(stage, axes) if axes else stage()


def _resolve_checkpoint(checkpoint: str | Path | Checkpoint) -> Path | Checkpoint:
    if isinstance(checkpoint, Checkpoint):
        return checkpoint
    return resolve_folder(str(checkpoint), quiet=dist.is_initialized() and dist.get_rank() > 0)


def _check_threads(threads: int | None) -> None:
    if threads is not None and threads < 1:
        raise UsageError(f"{threads} threads read nothing", hint="give 1 or more, or leave it out", threads=threads)
