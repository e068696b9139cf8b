"""Fill tensors with several reader threads: directly in host memory, through pinned buffers on a GPU."""

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
from runtime.checkpoint.files.system import count_cpus
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
"""Bytes of a buffer: large enough to make calls cheap, small enough for reads and copies to overlap."""

ReadGroup = Sequence[Read]
Targets = Mapping[int, LoadTarget]


class TransferWorker(Protocol):
    """Reads groups into their targets, one group at a time, on one thread."""

    def submit(self, group: ReadGroup) -> None:
        """Read a group, and copy it to its targets or start doing so."""

    def finish(self) -> None:
        """Wait until all copies are complete."""


def run_workers(groups: Iterable[ReadGroup], threads: int, make_worker: Callable[[], TransferWorker]) -> None:
    """Read all groups into their targets.

    Args:
        groups: the groups of reads.
        threads: the number of threads.
        make_worker: makes a worker; called once on each thread.

    Raises:
        IncompleteError: a file is shorter than its header says.
        CheckpointError: a file cannot be read.
    """
    shared = _SharedIterator(iter(groups))

    def run_worker() -> None:
        try:
            worker = make_worker()
            try:
                for group in shared:
                    worker.submit(group)
            finally:
                # Even after a failed read, or a pending copy could write to memory that has been freed meanwhile.
                worker.finish()
        except BaseException:
            shared.stop()
            raise

    with ThreadPoolExecutor(threads) as pool:
        futures = [pool.submit(run_worker) for _ in range(threads)]
    for future in futures:
        future.result()


class _SharedIterator:
    """An iterator that several threads share, until it ends or one of them fails."""

    def __init__(self, items: Iterator[ReadGroup]) -> None:
        self._items, self._lock = items, Lock()

    def __iter__(self) -> Iterator[ReadGroup]:
        while True:
            with self._lock:
                item = next(self._items, None)
            if item is None:
                return
            yield item

    def stop(self) -> None:
        with self._lock:
            self._items = iter(())


class HostWorker:
    """Reads into host memory, through a buffer only if elements are strided or cast."""

    def __init__(self, targets: Targets) -> None:
        self._targets = targets
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def submit(self, group: ReadGroup) -> None:
        """Read a group into its targets."""
        for read in group:
            first = read.parts[0]
            target = self._targets[first.destination]
            if len(read.parts) == 1 and target.can_copy_bytes(first):
                read_range(read, target.view_bytes(first).numpy().data)
            else:
                self._transfer_through_buffer(read)

    def finish(self) -> None:
        """Do nothing, because `submit` leaves no copy pending."""

    def _transfer_through_buffer(self, read: Read) -> None:
        if not len(self._buffer):
            self._buffer = torch.empty(BUFFER_BYTES, dtype=torch.uint8)
        read_range(read, self._buffer.numpy().data[: read.size])
        for part in read.parts:
            copy_elements(part, self._buffer, read.start, self._targets[part.destination])


@dataclass
class _StagingBuffer:
    """One of the two buffers of a thread: one is read into while the other is copied from."""

    pinned: torch.Tensor
    memory: memoryview
    copy_done: torch.cuda.Event
    on_device: torch.Tensor | None = None


class CudaWorker:
    """Reads into two pinned buffers alternately, from which its own stream copies to tensors on a GPU.

    Bytes that are contiguous in file and tensor are copied directly into place. Others are copied as they were read
    and rearranged on the device, which is faster there.
    """

    def __init__(self, targets: Targets, device: torch.device, producer_stream: torch.cuda.Stream) -> None:
        """Allocate the buffers.

        Args:
            targets: the tensors to fill, by the index that strided copies use.
            device: the device that they are on.
            producer_stream: the stream that allocated them, which the worker's own stream waits for.
        """
        torch.cuda.set_device(device)
        self._targets, self._device = targets, device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._stream.wait_stream(producer_stream)
        self._staging_buffers = [self._make_staging_buffer(), self._make_staging_buffer()]

    def submit(self, group: ReadGroup) -> None:
        """Read a group, and start copying it."""
        staging = self._staging_buffers[0]
        self._staging_buffers.reverse()
        staging.copy_done.synchronize()
        offsets = compute_buffer_offsets(group)
        for read, offset in zip(group, offsets, strict=True):
            read_range(read, staging.memory[offset : offset + read.size])
        with torch.cuda.stream(self._stream):
            for read, offset in zip(group, offsets, strict=True):
                self._copy_to_device(read, offset, staging)
            staging.copy_done.record(self._stream)

    def finish(self) -> None:
        """Wait for the stream's copies."""
        self._stream.synchronize()

    def _copy_to_device(self, read: Read, offset: int, staging: _StagingBuffer) -> None:
        if all(self._targets[part.destination].can_copy_bytes(part) for part in read.parts):
            for part in read.parts:
                start = offset + part.source_offset - read.start
                content = staging.pinned[start : start + part.length]
                self._targets[part.destination].view_bytes(part).copy_(content, non_blocking=True)
            return
        if staging.on_device is None:
            staging.on_device = torch.empty_like(staging.pinned, device=self._device)
        end = offset + read.size
        staging.on_device[offset:end].copy_(staging.pinned[offset:end], non_blocking=True)
        for part in read.parts:
            copy_elements(part, staging.on_device, read.start - offset, self._targets[part.destination])

    @staticmethod
    def _make_staging_buffer() -> _StagingBuffer:
        pinned = _allocate_pinned(BUFFER_BYTES)
        return _StagingBuffer(pinned, pinned.numpy().data, torch.cuda.Event())  # type: ignore[no-untyped-call]


def _allocate_pinned(size: int) -> torch.Tensor:
    """Return page-locked memory, which a GPU copies from asynchronously."""
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)


def read_range(read: Read, memory: memoryview) -> None:
    """Read a range of a file into memory, without holding the interpreter's lock."""
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
    """Fill tensors from a checkpoint, casting those that have another dtype.

    Args:
        source: where the tensors' bytes are.
        local_tensors: contiguous tensors by name, in the shapes of the source's tensor maps, on any CPU or CUDA device.
        names: the tensors to fill.
        threads: the number of reader threads.

    Raises:
        UsageError: a tensor is on a device that is neither the CPU nor a CUDA GPU.
        IncompleteError, CheckpointError: see `run_workers`.
    """
    by_device: defaultdict[torch.device, list[str]] = defaultdict(list)
    for name in names:
        by_device[local_tensors[name].device].append(name)
    for device, on_device in by_device.items():
        _transfer_to_device(source, {name: local_tensors[name] for name in on_device}, device, threads)


def default_threads() -> int:
    """Return the default number of reader threads: this rank's share of the processors."""
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(_MAX_THREADS, count_cpus() // local_ranks))


def _transfer_to_device(
    source: LoadSource, local_tensors: Mapping[str, torch.Tensor], device: torch.device, threads: int
) -> None:
    destinations = [
        (Destination(name, tensor_bytes(source.dtypes[name], source.tensor_maps[name].shape)), source.tensor_maps[name])
        for name in local_tensors
    ]
    copy_plan = build_copy_plan(source.chunks, destinations)
    targets = dict(enumerate(build_target(local, DTYPES[source.dtypes[name]]) for name, local in local_tensors.items()))
    reads = plan_reads(copy_plan.sources, copy_plan.copies, BUFFER_BYTES, _make_alone_predicate(targets, device))
    run_workers(group_reads(reads, BUFFER_BYTES), threads, _make_worker_factory(targets, device))


def _make_alone_predicate(targets: Mapping[int, LoadTarget], device: torch.device) -> Callable[[StridedCopy], bool]:
    """Return a predicate of the parts that are read directly into place: in host memory, those copied byte by byte."""
    if device.type == "cpu":
        return lambda part: targets[part.destination].can_copy_bytes(part)
    return lambda part: False


def _make_worker_factory(targets: Mapping[int, LoadTarget], device: torch.device) -> Callable[[], TransferWorker]:
    if device.type == "cpu":
        return lambda: HostWorker(targets)
    if device.type != "cuda":
        raise UsageError(
            f"cannot load into tensors on {device}", hint="load on cpu or cuda, then move the model", device=str(device)
        )
    producer_stream = torch.cuda.current_stream(device)
    return lambda: CudaWorker(targets, device, producer_stream)
