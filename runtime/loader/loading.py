"""Load a checkpoint of any layout into a model: each rank reads only its own bytes, directly into place."""

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

_Result = TypeVar("_Result")


def load(
    model: PreTrainedModel,
    checkpoint: str | Path | Checkpoint,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    threads: int | None = None,
    every_copy: bool = False,
) -> None:
    """Load a checkpoint into a model, in place. All ranks of a parallel model must call this.

    Each rank reads only the byte ranges that hold its own tensors: its own file if the checkpoint consists of rank
    files that are sharded like the model, else its slices of the other files. A model on meta is given memory for its
    local tensors only; a model in memory is filled where it is. Tied weights stay tied.

    Buffers that no checkpoint stores, such as rotary embedding tables, are set to the values of a model newly built
    from the same config. A buffer that the new model lacks, or has in another shape, keeps its value. Stored tensors
    for which the model has no parameter are ignored.

    Digests are not checked; `migrator verify` and `migrator validate` do that.

    Args:
        model: the model, parallel or not, on meta or in memory.
        checkpoint: a folder in any layout, `hf://owner/name`, or a checkpoint that was already read.
        dtype: the dtype to cast floating-point tensors to, on their device. Tensors that transformers'
            `from_pretrained` keeps in a wider dtype are kept in it here too, unless FSDP gathers them together with
            others, which supports one dtype only. By default a model on meta takes the stored dtypes, and a model in
            memory keeps its own.
        device: the device for a model on meta; by default the device of its mesh.
        threads: the number of reader threads, at least 1; by default this rank's share of the processors.
        every_copy: whether each rank reads replicated tensors itself, even where one rank could broadcast them.

    Raises:
        IncompleteError: a file or a tensor of the model is missing.
        MismatchError: the checkpoint holds tensors that the model lacks, or tensors of other shapes or kinds.
        CheckpointError: the checkpoint is damaged, or no known operation converts its tensors to the model's.
        UsageError: the checkpoint is quantized, a tensor cannot be given memory, or an argument is not valid.
        WorkerError: another rank died.
    """
    refs = find_parameter_refs(model)

    def transfer_own_tensors() -> tuple[ModelMemory, dict[str, int]]:
        _check_threads(threads)
        check_dtype(dtype)
        non_persistent = rebuild_non_persistent(model, refs, dtype)
        check_cast(dtype, refs, non_persistent.kept_dtypes)
        target_device = torch.device(device) if device is not None else default_device(refs.values())
        source = find_source(_resolve_checkpoint(checkpoint), model, refs)
        memory = prepare_memory(model, refs, source, target_device, dtype, non_persistent)
        readers = {} if every_copy else assign_readers(refs, memory.local_tensors)
        own = [name for name in refs if name not in readers or readers[name] == dist.get_rank()]
        transfer(source, memory.local_tensors, own, threads or default_threads())
        return memory, readers

    with gc_paused():
        memory, readers = _run_on_all_ranks(transfer_own_tensors, mesh_axes(refs.values()))
    broadcast_tensors(readers, memory.local_tensors)
    memory.install(model)


def _run_on_all_ranks(action: Callable[[], _Result], axes: Sequence[DeviceMesh]) -> _Result:
    """Run an action; if several ranks share the model, all of them raise if it fails on one."""
    return raise_on_any_rank(action, axes) if axes else action()


def _resolve_checkpoint(checkpoint: str | Path | Checkpoint) -> Path | Checkpoint:
    if isinstance(checkpoint, Checkpoint):
        return checkpoint
    return resolve_folder(str(checkpoint), quiet=dist.is_initialized() and dist.get_rank() > 0)


def _check_threads(threads: int | None) -> None:
    if threads is not None and threads < 1:
        raise UsageError(
            f"threads must be at least 1, got {threads}", hint="leave it out to use the default", threads=threads
        )
