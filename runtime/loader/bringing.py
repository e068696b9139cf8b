"""Bringing: a source's bytes to tensors in memory, planned as a proven run table and read by several threads."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping

import torch

from plans.errors import UsageError
from runtime.checkpoint.copying.table import Destination, build_table
from runtime.checkpoint.files.safetensors import tensor_bytes
from runtime.extents.runs import Run
from runtime.loader.filling import LIMIT, CudaWorker, HostWorker, Worker, fill
from runtime.loader.placing import Target, target_of
from runtime.loader.reads import reads, units
from runtime.loader.sources import Source
from runtime.models.dtypes import DTYPES

__all__ = ["bring", "default_threads"]

_MOST_THREADS = 16


def bring(source: Source, locals_: Mapping[str, torch.Tensor], names: Collection[str], threads: int) -> None:
    """Fill tensors with what a checkpoint holds of them, cast where they have another dtype.

    Args:
        source: where it lies.
        locals_: contiguous tensors by name, in the shapes of the source's forms, on one device or several.
        names: of those to fill.
        threads: that read at once.

    Raises:
        UsageError: a tensor is on a device that is neither the CPU nor a CUDA GPU.
        IncompleteError, CheckpointError: as `fill`.
    """
    by_device: defaultdict[torch.device, list[str]] = defaultdict(list)
    for name in names:
        by_device[locals_[name].device].append(name)
    for device, there in by_device.items():
        _bring(source, {name: locals_[name] for name in there}, device, threads)


def default_threads() -> int:
    """Return how many threads read where nothing else is said: this rank's share of the processors."""
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(_MOST_THREADS, len(os.sched_getaffinity(0)) // ranks_here))


def _bring(source: Source, locals_: Mapping[str, torch.Tensor], device: torch.device, threads: int) -> None:
    rows = [
        (Destination(name, tensor_bytes(source.dtypes[name], source.forms[name].shape)), source.forms[name])
        for name in locals_
    ]
    table = build_table(source.pieces, rows)
    targets = dict(enumerate(target_of(local, DTYPES[source.dtypes[name]]) for name, local in locals_.items()))
    found = reads(table.sources, table.runs, LIMIT, _read_alone(targets, device))
    fill(units(found, LIMIT), threads, _worker(targets, device))


def _read_alone(targets: Mapping[int, Target], device: torch.device) -> Callable[[Run], bool]:
    """Return which parts are read straight to their places: on a host those that lie there as they do in the file."""
    if device.type == "cpu":
        return lambda part: targets[part.destination].takes_bytes(part)
    return lambda part: False


def _worker(targets: Mapping[int, Target], device: torch.device) -> Callable[[], Worker]:
    if device.type == "cpu":
        return lambda: HostWorker(targets)
    if device.type != "cuda":
        raise UsageError(
            f"tensors on {device} cannot be loaded", hint="load on cpu or cuda, then move the model", device=str(device)
        )
    before = torch.cuda.current_stream(device)
    return lambda: CudaWorker(targets, device, before)
