"""Filling: threads that each bring reads to their targets, in memory directly, on a GPU through pinned buffers."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock
from typing import Protocol

import torch

from plans.errors import UsageError
from runtime.checkpoint.copying.copy_plan import Destination, build_copy_plan
from runtime.checkpoint.files.reading import convert_read_errors, read_exactly
from runtime.checkpoint.files.safetensors import tensor_bytes
from runtime.loader.reads import (
    LoadTarget,
    Read,
    build_target,
    compute_buffer_offsets,
    copy_elements,
    group_reads,
    plan_reads,
)
from runtime.loader.sources import LoadSource
from runtime.models.dtypes import DTYPES
from runtime.tensor_map.strided_copy import StridedCopy

__all__ = [
    "BUFFER_BYTES",
    "CudaWorker",
    "HostWorker",
    "TransferWorker",
    "default_threads",
    "read_range",
    "run_workers",
    "transfer",
]


BUFFER_BYTES = 8 * 2**20
"""Bytes of a buffer: large enough that calls do not matter, small enough that reading and copying overlap."""

ReadGroup = Sequence[Read]
Targets = Mapping[int, LoadTarget]


class TransferWorker(Protocol):
    """Brings units to their targets, one at a time."""

    def submit(self, group: ReadGroup) -> None:
        """Read a unit and place it, or set out to."""

    def finish(self) -> None:
        """Wait until everything is in its place."""


def run_workers(groups: Iterable[ReadGroup], threads: int, make_worker: Callable[[], TransferWorker]) -> None:
    """Bring all units to their targets.

    Args:
        groups: the units.
        threads: how many take part.
        make_worker: makes one for each thread, in it.

    Raises:
        IncompleteError: a file ends before its tensors do.
        CheckpointError: a file cannot be read.
    """
    shared = _SharedIterator(iter(groups))

    def run_worker() -> None:
        try:
            own = make_worker()
            try:
                for unit in shared:
                    own.submit(unit)
            finally:
                # Also where reading failed: a copy still under way would write to memory that others may have by then.
                own.finish()
        except BaseException:
            shared.stop()
            raise

    with ThreadPoolExecutor(threads) as pool:
        parts = [pool.submit(run_worker) for _ in range(threads)]
    for part in parts:
        part.result()


class _SharedIterator:
    """An iterator that several threads take from, until it ends or one of them fails."""

    def __init__(self, items: Iterator[ReadGroup]) -> None:
        self._items, self._lock = items, Lock()

    def __iter__(self) -> Iterator[ReadGroup]:
        while True:
            with self._lock:
                found = next(self._items, None)
            if found is None:
                return
            yield found

    def stop(self) -> None:
        with self._lock:
            self._items = iter(())


class HostWorker:
    """Reads to tensors in this machine's memory, through a buffer only where elements are moved apart or cast."""

    def __init__(self, targets: Targets) -> None:
        self._targets = targets
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def submit(self, group: ReadGroup) -> None:
        """Read a unit and place it."""
        for read in group:
            first = read.parts[0]
            target = self._targets[first.destination]
            if len(read.parts) == 1 and target.can_copy_bytes(first):
                read_range(read, target.view_bytes(first).numpy().data)
            else:
                self._transfer_through_buffer(read)

    def finish(self) -> None:
        """Do nothing: all is in its place."""

    def _transfer_through_buffer(self, read: Read) -> None:
        if not len(self._buffer):
            self._buffer = torch.empty(BUFFER_BYTES, dtype=torch.uint8)
        read_range(read, self._buffer.numpy().data[: read.size])
        for part in read.parts:
            copy_elements(part, self._buffer, read.start, self._targets[part.destination])


@dataclass
class _StagingBuffer:
    """One of the two buffers of a thread: while one is read into, the other is copied from."""

    pinned: torch.Tensor
    memory: memoryview
    copy_done: torch.cuda.Event
    on_device: torch.Tensor | None = None


class CudaWorker:
    """Reads to pinned buffers in turn, from where a stream of its own copies to tensors on a GPU.

    What follows one another in file and tensor is copied straight to its place. All else is copied as it was read and
    moved apart on the device, which is quicker there.
    """

    def __init__(self, targets: Targets, device: torch.device, producer_stream: torch.cuda.Stream) -> None:
        """Prepare buffers.

        Args:
            targets: by the number that runs use.
            device: that they are on.
            producer_stream: the stream that made them, whose work comes first.
        """
        torch.cuda.set_device(device)
        self._targets, self._device = targets, device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._stream.wait_stream(producer_stream)
        self._staging_buffers = [self._make_staging_buffer(), self._make_staging_buffer()]

    def submit(self, group: ReadGroup) -> None:
        """Read a unit and set out to copy it."""
        half = self._staging_buffers[0]
        self._staging_buffers.reverse()
        half.copy_done.synchronize()
        begins = compute_buffer_offsets(group)
        for read, begin in zip(group, begins, strict=True):
            read_range(read, half.memory[begin : begin + read.size])
        with torch.cuda.stream(self._stream):
            for read, begin in zip(group, begins, strict=True):
                self._copy_to_device(read, begin, half)
            half.copy_done.record(self._stream)

    def finish(self) -> None:
        """Wait for the stream."""
        self._stream.synchronize()

    def _copy_to_device(self, read: Read, begin: int, staging: _StagingBuffer) -> None:
        if all(self._targets[part.destination].can_copy_bytes(part) for part in read.parts):
            for part in read.parts:
                first = begin + part.source_offset - read.start
                found = staging.pinned[first : first + part.length]
                self._targets[part.destination].view_bytes(part).copy_(found, non_blocking=True)
            return
        if staging.on_device is None:
            staging.on_device = torch.empty_like(staging.pinned, device=self._device)
        end = begin + read.size
        staging.on_device[begin:end].copy_(staging.pinned[begin:end], non_blocking=True)
        for part in read.parts:
            copy_elements(part, staging.on_device, read.start - begin, self._targets[part.destination])

    @staticmethod
    def _make_staging_buffer() -> _StagingBuffer:
        pinned = _allocate_pinned(BUFFER_BYTES)
        return _StagingBuffer(pinned, pinned.numpy().data, torch.cuda.Event())  # type: ignore[no-untyped-call]


def _allocate_pinned(size: int) -> torch.Tensor:
    """Return memory that a GPU can copy from while the processor does other things."""
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)


def read_range(read: Read, memory: memoryview) -> None:
    """Read a range of a file into memory; the interpreter does other things meanwhile."""
    with convert_read_errors(read.file):
        descriptor = os.open(read.file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        read_exactly(descriptor, memory, read.start, read.file)
    finally:
        os.close(descriptor)


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
