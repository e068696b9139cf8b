"""Bringing: a source's bytes to tensors in memory, planned as a proven run table and read by several threads."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping

import torch

from plans.errors import UsageError
from runtime.checkpoint.copying.table import Destination, build_copy_plan
from runtime.checkpoint.files.safetensors import tensor_bytes
from runtime.extents.runs import StridedCopy
from runtime.loader.filling import BUFFER_BYTES, CudaWorker, HostWorker, TransferWorker, run_workers
from runtime.loader.placing import LoadTarget, build_target
from runtime.loader.reads import group_reads, plan_reads
from runtime.loader.sources import LoadSource
from runtime.models.dtypes import DTYPES

__all__ = ["default_threads", "transfer"]

_MAX_THREADS = 16


def transfer(
    source: LoadSource, local_tensors: Mapping[str, torch.Tensor], names: Collection[str], threads: int
) -> None:
    """Fill tensors with what a checkpoint holds of them, cast where they have another dtype.

    Args:
        source: where it lies.
        local_tensors: contiguous tensors by name, in the shapes of the source's forms, on one device or several.
        names: of those to fill.
        threads: that read at once.

    Raises:
        UsageError: a tensor is on a device that is neither the CPU nor a CUDA GPU.
        IncompleteError, CheckpointError: as `fill`.
    """
    by_device: defaultdict[torch.device, list[str]] = defaultdict(list)
    for name in names:
        by_device[local_tensors[name].device].append(name)
    for device, there in by_device.items():
        _transfer_to_device(source, {name: local_tensors[name] for name in there}, device, threads)


def default_threads() -> int:
    """Return how many threads read where nothing else is said: this rank's share of the processors."""
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(_MAX_THREADS, len(os.sched_getaffinity(0)) // ranks_here))


def _transfer_to_device(
    source: LoadSource, local_tensors: Mapping[str, torch.Tensor], device: torch.device, threads: int
) -> None:
    rows = [
        (Destination(name, tensor_bytes(source.dtypes[name], source.tensor_maps[name].shape)), source.tensor_maps[name])
        for name in local_tensors
    ]
    table = build_copy_plan(source.chunks, rows)
    targets = dict(enumerate(build_target(local, DTYPES[source.dtypes[name]]) for name, local in local_tensors.items()))
    found = plan_reads(table.sources, table.copies, BUFFER_BYTES, _make_alone_predicate(targets, device))
    run_workers(group_reads(found, BUFFER_BYTES), threads, _make_worker_factory(targets, device))


def _make_alone_predicate(targets: Mapping[int, LoadTarget], device: torch.device) -> Callable[[StridedCopy], bool]:
    """Return which parts are read straight to their places: on a host those that lie there as they do in the file."""
    if device.type == "cpu":
        return lambda part: targets[part.destination].can_copy_bytes(part)
    return lambda part: False


def _make_worker_factory(targets: Mapping[int, LoadTarget], device: torch.device) -> Callable[[], TransferWorker]:
    if device.type == "cpu":
        return lambda: HostWorker(targets)
    if device.type != "cuda":
        raise UsageError(
            f"tensors on {device} cannot be loaded", hint="load on cpu or cuda, then move the model", device=str(device)
        )
    before = torch.cuda.current_stream(device)
    return lambda: CudaWorker(targets, device, before)
