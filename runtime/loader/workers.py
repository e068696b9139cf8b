"""Reader threads: each reads blocks into tensors, directly in host memory, through pinned buffers on a GPU."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Protocol

import torch

from runtime.checkpoint.files.reading import convert_read_errors, read_exactly
from runtime.checkpoint.files.system import READ_ONLY
from runtime.checkpoint.verifying.fused_sums import SumRange
from runtime.checkpoint.verifying.tensor_digest import DeviceSums
from runtime.loader.reads import LoadTarget, Read, compute_buffer_offsets, copy_elements
from runtime.loader.verification import HostSums
from runtime.tensor_map.strided_copy import StridedCopy

__all__ = ["CudaWorker", "HostWorker", "ReadOnlyFiles", "TransferWorker", "read_range", "run_workers"]

ReadGroup = Sequence[Read]
Targets = Mapping[int, LoadTarget]

_SWITCH_INTERVAL = 1e-4
_MANY_PARTS = 4
"""Fewer parts of a block are copied one by one, straight into place."""

_MAX_OPEN = 256
"""How many descriptors stay open, well below the system's limit on open files."""


class ReadOnlyFiles:
    """Files that several threads read by offsets, each opened once; those beyond `_MAX_OPEN` for each use."""

    def __init__(self) -> None:
        self._descriptors: dict[Path, int] = {}
        self._lock = Lock()

    def read(self, file: Path, memory: memoryview, offset: int) -> None:
        """Fill memory with the bytes of a file at an offset, without holding the interpreter's lock.

        Raises:
            IncompleteError: the file ends before the memory is full.
            CheckpointError: the file cannot be read.
        """
        descriptor = self._descriptors.get(file)
        if descriptor is None:
            descriptor = self._open(file)
        try:
            read_exactly(descriptor, memory, offset, file)
        finally:
            if self._descriptors.get(file) != descriptor:
                os.close(descriptor)

    def _open(self, file: Path) -> int:
        with self._lock, convert_read_errors(file):
            if file in self._descriptors:
                return self._descriptors[file]
            descriptor = os.open(file, READ_ONLY)
            if len(self._descriptors) < _MAX_OPEN:
                self._descriptors[file] = descriptor
            return descriptor

    def __enter__(self) -> ReadOnlyFiles:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])


def read_range(read: Read, memory: memoryview, files: ReadOnlyFiles) -> None:
    """Read a range of a file into memory."""
    files.read(read.file, memory, read.start)


class TransferWorker(Protocol):
    """Reads groups into their targets, one group at a time, on one thread."""

    def submit(self, group: ReadGroup) -> None:
        """Read a group, and copy it to its targets or start doing so."""

    def finish(self) -> None:
        """Wait until all copies are complete, and let go of all buffers."""


def run_workers(groups: Iterable[ReadGroup], threads: int, make_worker: Callable[[], TransferWorker]) -> None:
    """Read all groups into their targets. When it returns or raises, no thread is left and no copy is pending.

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
        except BaseException as error:
            shared.stop()
            # The frames of an error that is kept would keep the buffers.
            traceback.clear_frames(error.__traceback__)
            raise

    with _quick_switches(), ThreadPoolExecutor(threads) as pool:
        try:
            futures = [pool.submit(run_worker) for _ in range(threads)]
            wait(futures, return_when=FIRST_EXCEPTION)
        except BaseException:  # an interrupt of this thread, after which the others must not go on to the last group
            shared.stop()
            raise
    for future in futures:
        future.result()


@contextmanager
def _quick_switches() -> Iterator[None]:
    """Let threads wait 0.1 ms in place of 5 for an interpreter that another one computes with.

    Readers compute little, but all of them need the interpreter behind each read: on one H200, 16 GB in hub form took
    0.91 to 0.95 of the time.
    """
    before = sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH_INTERVAL)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


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

    def __init__(self, targets: Targets, files: ReadOnlyFiles, block: int, sums: HostSums | None = None) -> None:
        """Begin without a buffer.

        Args:
            targets: the tensors to fill, by the destination that strided copies name.
            files: the files to read.
            block: the bytes of the largest read.
            sums: what the bytes are added to while they are in the processor's cache, None to add them to nothing.
        """
        self._targets, self._files, self._block = targets, files, block
        self._sums = sums.begin_share() if sums else None
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def submit(self, group: ReadGroup) -> None:
        """Read a group into its targets."""
        for read in group:
            first = read.parts[0]
            place = self._targets[first.destination].view_bytes(first) if len(read.parts) == 1 else None
            content = self._get_buffer()[: read.size] if place is None else place
            read_range(read, content.numpy().data, self._files)
            for part in read.parts:
                target = self._targets[part.destination]
                if place is None:
                    copy_elements(part, self._buffer, read.start, target)
                if self._sums is not None:
                    self._sums.add(target.number, part, content.numpy(), read.start)

    def finish(self) -> None:
        """Let go of the buffer, and hand over the sums; `submit` leaves no copy pending."""
        self._buffer = torch.empty(0, dtype=torch.uint8)
        if self._sums is not None:
            self._sums.finish()

    def _get_buffer(self) -> torch.Tensor:
        if not len(self._buffer):
            self._buffer = torch.empty(self._block, dtype=torch.uint8)
        return self._buffer


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
    and rearranged on the device, which is faster there. Sums are taken behind the copies, on the same stream. Many
    parts at once are rearranged by the kernel that takes the sums, as each call of torch waits for the interpreter.
    """

    def __init__(
        self,
        targets: Targets,
        files: ReadOnlyFiles,
        block: int,
        device: torch.device,
        producer_stream: torch.cuda.Stream,
        sums: DeviceSums | None = None,
    ) -> None:
        """Allocate the buffers.

        Args:
            targets: the tensors to fill, by the destination that strided copies name.
            files: the files to read.
            block: the bytes of a buffer, at least those of the largest read.
            device: the device that the tensors are on.
            producer_stream: the stream that allocated them, which the worker's own stream waits for.
            sums: what the bytes are added to, None to add them to nothing.
        """
        torch.cuda.set_device(device)
        self._targets, self._files, self._block, self._device, self._sums = targets, files, block, device, sums
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
            read_range(read, staging.memory[offset : offset + read.size], self._files)
        placed = list(zip(group, offsets, strict=True))
        with torch.cuda.stream(self._stream):
            if (
                self._sums is not None
                and self._sums.can_write
                and sum(len(read.parts) for read in group) >= _MANY_PARTS
            ):
                ranges = self._copy_together(placed, staging)
            else:
                ranges = [part for read, offset in placed for part in self._copy_to_device(read, offset, staging)]
            if self._sums is not None:
                self._sums.add(ranges)
            staging.copy_done.record(self._stream)

    def finish(self) -> None:
        """Wait for the stream's copies, and let go of the buffers."""
        self._stream.synchronize()
        self._staging_buffers.clear()

    def _copy_together(self, placed: Sequence[tuple[Read, int]], staging: _StagingBuffer) -> list[SumRange]:
        """Start copying reads in one piece, and return where each part is on the device then and where it belongs."""
        last, offset = placed[-1]
        on_device = self._copy_staged(staging, slice(0, offset + last.size))
        ranges: list[SumRange] = []
        for read, offset in placed:
            for part in read.parts:
                target = self._targets[part.destination]
                place = target.locate(part)
                if place is None:
                    copy_elements(part, on_device, read.start - offset, target)
                ranges.append(SumRange(on_device, _with_number(part, read.start - offset, self._targets), place))
        return ranges

    def _copy_to_device(self, read: Read, offset: int, staging: _StagingBuffer) -> Iterator[SumRange]:
        """Start copying a read, and yield where each part is on the device then."""
        places = [self._targets[part.destination].view_bytes(part) for part in read.parts]
        if all(place is not None for place in places):
            for part, place in zip(read.parts, places, strict=True):
                assert place is not None
                start = offset + part.source_offset - read.start
                # A contiguous part may have strides in the whole tensor, but none in the file.
                place.copy_(staging.pinned[start : start + len(place)], non_blocking=True)
                yield SumRange(place, _with_number(part, part.source_offset, self._targets))
            return
        on_device = self._copy_staged(staging, slice(offset, offset + read.size))
        for part in read.parts:
            copy_elements(part, on_device, read.start - offset, self._targets[part.destination])
            yield SumRange(on_device, _with_number(part, read.start - offset, self._targets))

    def _copy_staged(self, staging: _StagingBuffer, where: slice) -> torch.Tensor:
        """Start copying a part of a buffer as it is, and return the buffer on the device."""
        if staging.on_device is None:
            staging.on_device = torch.empty_like(staging.pinned, device=self._device)
        staging.on_device[where].copy_(staging.pinned[where], non_blocking=True)
        return staging.on_device

    def _make_staging_buffer(self) -> _StagingBuffer:
        pinned = _allocate_pinned(self._block)
        return _StagingBuffer(pinned, pinned.numpy().data, torch.cuda.Event())  # type: ignore[no-untyped-call]


def _with_number(part: StridedCopy, start: int, targets: Targets) -> StridedCopy:
    """Return a part whose source begins at `start` and whose destination is the tensor's number, as sums need it."""
    number = targets[part.destination].number
    return part._replace(source_offset=part.source_offset - start, destination=number)


def _allocate_pinned(size: int) -> torch.Tensor:
    """Return page-locked memory, which a GPU copies from asynchronously. torch keeps it for the next load."""
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)
