"""Load a checkpoint of any layout into a model: each rank reads only its own bytes, directly into place."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from plans.errors import UsageError
from plans.gc_paused import gc_paused
from plans.text import format_names
from runtime.checkpoint.checkpoint import Checkpoint
from runtime.checkpoint.digest_file import read_digest_file
from runtime.checkpoint.files import side_files
from runtime.hub import resolve_folder
from runtime.loader.memory import ModelMemory, check_cast, check_dtype, prepare_memory
from runtime.loader.non_persistent import rebuild_non_persistent
from runtime.loader.parameter_refs import ParameterRef, default_device, find_parameter_refs, mesh_axes
from runtime.loader.replicated import assign_readers, broadcast_tensors
from runtime.loader.sources import LoadSource, find_source
from runtime.loader.transfer import TransferResult, default_threads, transfer
from runtime.loader.verification import LoadResult, check_digests
from runtime.parallel.pipeline import find_stage
from runtime.processes.agreement import raise_on_any_rank

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["LoadResult", "load"]

_Result = TypeVar("_Result")


def load(
    model: PreTrainedModel,
    checkpoint: str | Path | Checkpoint,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    threads: int | None = None,
    every_copy: bool = False,
    follow_links: bool = False,
    verify: bool = True,
    digests: Mapping[str, str] | str | os.PathLike[str] | None = None,
) -> LoadResult:
    """Load a checkpoint into a model, in place. All ranks of a parallel model must call this.

    Each rank reads only the byte ranges that hold its own tensors: its own file if the checkpoint consists of rank
    files that are sharded like the model, else its slices of the other files. A model on meta is given memory for its
    local tensors only; a model in memory is filled where it is. Tied weights stay tied.

    Buffers that no checkpoint stores, such as rotary embedding tables, are set to the values of a model newly built
    from the same config. A buffer that the new model lacks, or has in another shape, keeps its value. Stored tensors
    for which the model has no parameter are ignored.

    If digests are known, the bytes are digested on their device while they are loaded, and the model gets its weights
    only if all of them are right. A model in memory is filled in place: after an error its tensors are neither the old
    ones nor the checkpoint's, so load again or discard it. A model on meta is left on meta.

    Args:
        model: the model, parallel or not, on meta or in memory.
        checkpoint: a folder in any layout, its address, such as `hf://owner/name` or `s3://bucket/folder`, or a
            checkpoint that was already read.
        dtype: the dtype to cast floating-point tensors to, on their device. Tensors that transformers'
            `from_pretrained` keeps in a wider dtype are kept in it here too, unless FSDP gathers them together with
            others, which supports one dtype only. By default a model on meta takes the stored dtypes, and a model in
            memory keeps its own.
        device: the device for a model on meta; by default the device of its mesh.
        threads: the number of reader threads, at least 1; by default this rank's share of the processors.
        every_copy: whether each rank reads replicated tensors itself, even where one rank could broadcast them.
        follow_links: whether to read links that lead out of the checkpoint's folder.
        verify: whether to compare what is read with the digests, if any are known.
        digests: the digest of each tensor by its name in the model, as a manifest records them, or a file that
            `migrator verify --record` wrote; by default those of the checkpoint's manifest, without which the load is
            not verified.

    Returns:
        How many bytes this rank read, and whether they were verified, or why not.

    Raises:
        IncompleteError: a file or a tensor of the model is missing.
        MismatchError: the checkpoint holds tensors that the model lacks, or tensors of other shapes or kinds, or a
            tensor's content is not what was recorded.
        CheckpointError: the checkpoint is damaged, or no known operation converts its tensors to the model's.
        UsageError: the checkpoint is quantized, a tensor cannot be given memory, or an argument is not valid.
        WorkerError: another rank died.
    """
    refs = find_parameter_refs(model)
    axes, stage = mesh_axes(refs.values()), find_stage(model)
    all_axes = (*axes, stage.axis) if stage is not None else axes

    def transfer_own_tensors() -> _Transferred:
        _check_threads(threads)
        check_dtype(dtype)
        # Not while others read: they would wait for the interpreter longer than this takes.
        non_persistent = rebuild_non_persistent(model, refs, dtype)
        check_cast(dtype, refs, non_persistent.kept_dtypes)
        target_device = torch.device(device) if device is not None else default_device(refs.values())
        source = find_source(_resolve_checkpoint(checkpoint), model, refs)
        if digests is not None:
            known = digests if isinstance(digests, Mapping) else read_digest_file(Path(digests)).digests
            source = replace(source, digests=_select_digests(known, refs))
        memory = prepare_memory(model, refs, source, target_device, dtype, non_persistent.kept_dtypes)
        readers = {} if every_copy else assign_readers(refs, memory.local_tensors)
        own = [name for name in refs if name not in readers or readers[name] == dist.get_rank()]
        read = transfer(
            source,
            memory.local_tensors,
            own,
            threads or default_threads(),
            with_digests=verify and bool(source.digests),
        )
        return _Transferred(source, memory, readers, read, non_persistent.buffers)

    with gc_paused(), side_files.follow_links(follow_links):
        done = _run_on_all_ranks(transfer_own_tensors, all_axes)
    is_verified = verify and bool(done.source.digests)
    if is_verified:
        # The ranks of a stage fail together, and the other stages with them.
        stages = all_axes[len(axes) :]
        _run_on_all_ranks(lambda: check_digests(done.source, done.read.digests, axes), stages)
    broadcast_tensors(done.readers, done.memory.local_tensors)
    done.memory.install(model, done.buffers)
    reason = "" if is_verified else "no digests are recorded" if verify else "not asked for"
    return LoadResult(done.read.bytes_read, is_verified, reason)


@dataclass(frozen=True)
class _Transferred:
    """What a rank has read, and from where and to where, and the buffers that no checkpoint stores."""

    source: LoadSource
    memory: ModelMemory
    readers: Mapping[str, int]
    read: TransferResult
    buffers: Mapping[str, torch.Tensor]


def _select_digests(digests: Mapping[str, str], refs: Mapping[str, ParameterRef]) -> dict[str, str]:
    if missing := sorted(refs.keys() - digests.keys()):
        raise UsageError(
            f"digests lacks those of {format_names(missing)}",
            hint="pass the digests of all tensors of the model, or leave digests out",
            tensors=missing,
        )
    return {name: digests[name] for name in refs}


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
