"""Execute a copy plan: each source byte is read once, in slabs, and copied from there to all of its destinations.

Contiguous ranges are written from the slab that the digest has just read. Letting the system copy them from file to
file with `copy_file_range` would read them twice: on ext4 with a warm cache, it reached 0.65, 0.78 and 0.60 of the
speed with slabs of 1, 2 and 8 MiB, and used more processor time (`benchmarks/copy_calls.py`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from queue import SimpleQueue
from typing import Protocol

import numpy as np

from plans.errors import UsageError
from runtime.checkpoint.copying.assembler import Assembler
from runtime.checkpoint.copying.copy_plan import CopyPlan
from runtime.checkpoint.copying.regions import Region
from runtime.checkpoint.copying.slabs import Slab, group_slabs, plan_slabs
from runtime.checkpoint.copying.strided import Bytes, gather_contiguous, split_row_groups, view_rows
from runtime.checkpoint.files.reading import open_descriptor, read_exactly
from runtime.checkpoint.files.safetensors import StoredTensor
from runtime.checkpoint.files.system import count_cpus
from runtime.tensor_map.strided_copy import StridedCopy

__all__ = [
    "BLOCK",
    "DEFAULT_MEMORY",
    "Progress",
    "Recorder",
    "estimate_buffer_bytes",
    "execute_copy_plan",
    "plan_units",
    "slab_size",
    "write_part",
]

Progress = Callable[[int, int, str], None]
"""Called with the bytes done, the bytes in all and the current tensor's name."""

DEFAULT_MEMORY = 256 * 2**20

_SLAB = 2 * 2**20
"""Slabs of this size stay in the processor's cache from reading to writing; larger ones are slower."""

BLOCK = 2**20
_MIN_MEMORY = 2**20
_MAX_WORKERS = 4


class Recorder(Protocol):
    """Makes work that is done survive the death of the process."""

    @property
    def units(self) -> int:
        """The number of units that are safe already and need not be copied again."""

    def is_due(self) -> bool:
        """Return whether copying should pause so that the work can be recorded."""

    def record(self, units: int, bytes_done: int) -> None:
        """Record that so many units are done, all of whose bytes have been written to their regions."""


class _NullRecorder:
    units = 0

    def is_due(self) -> bool:
        return False

    def record(self, units: int, bytes_done: int) -> None:
        pass


def execute_copy_plan(
    copy_plan: CopyPlan,
    regions: Sequence[Region],
    *,
    max_memory: int = DEFAULT_MEMORY,
    progress: Progress | None = None,
    recorder: Recorder | None = None,
) -> int:
    """Read every source once and write to the region of each destination.

    Args:
        copy_plan: what to copy.
        regions: one region for each destination of the plan, written to from several threads.
        max_memory: the bytes that buffers may take.
        progress: called after every unit of work.
        recorder: records what is done, so that it survives a failure.

    Returns:
        The number of bytes read.

    Raises:
        UsageError: `max_memory` is below 1 MiB.
        IncompleteError: a source file ends before its tensors do.
        CheckpointError: a source file cannot be read.
    """
    if max_memory < _MIN_MEMORY:
        raise UsageError(
            f"max_memory must be at least 1 MiB, got {max_memory} bytes",
            hint="allow 1 MiB or more",
            max_memory=max_memory,
        )
    recorder = recorder or _NullRecorder()
    limit = slab_size(max_memory)
    work = plan_units(copy_plan, max_memory)
    count, read = recorder.units, 0
    done = sum(_count_progress_bytes(unit, copy_plan) for unit in islice(work, count))
    sizes = [destination.size for destination in copy_plan.destinations]
    assembler = Assembler(regions, sizes, max_memory // 2, min(BLOCK, limit), is_new=not count)
    copying = _CopyPool(copy_plan, regions, assembler, limit)
    for unit, is_still in copying.copy_units(work, recorder.is_due):
        count += 1
        read += sum(slab.size for slab in unit)
        done += _count_progress_bytes(unit, copy_plan)
        if progress is not None:
            progress(done, copy_plan.progress_bytes, copy_plan.destinations[unit[-1].parts[0].destination].name)
        if is_still and recorder.is_due():
            assembler.flush()
            recorder.record(count, done)
    assembler.flush()
    return read


def plan_units(copy_plan: CopyPlan, max_memory: int) -> Iterator[tuple[Slab, ...]]:
    """Yield the units of work of a copy, always the same for the same plan and memory."""
    limit = slab_size(max_memory)
    return group_slabs(plan_slabs(copy_plan.sources, copy_plan.copies, copy_plan.narrow_destinations, limit), limit)


def slab_size(max_memory: int) -> int:
    """Return the size of a slab: each worker holds one, a gathered copy of it, and scratch space for a digest."""
    return min(_SLAB, max_memory // (6 * _MAX_WORKERS))


def estimate_buffer_bytes(copy_plan: CopyPlan, max_memory: int) -> int:
    """Return what copying allocates at most: each worker's slab, its copy and scratch space, and the assembler."""
    slabs_and_scratch = 3 * _count_workers() * slab_size(max_memory)
    return slabs_and_scratch + (max_memory // 2 if copy_plan.narrow_destinations else 0)


def _count_workers() -> int:
    return min(_MAX_WORKERS, count_cpus())


def _count_progress_bytes(unit: Sequence[Slab], copy_plan: CopyPlan) -> int:
    parts = (part for slab in unit for part in slab.parts)
    return sum(part.size for part in parts if part.destination in copy_plan.progress_destinations)


class _CopyPool:
    """Threads that each copy one unit at a time."""

    def __init__(self, copy_plan: CopyPlan, regions: Sequence[Region], assembler: Assembler, limit: int) -> None:
        self._copy_plan, self._regions, self._assembler = copy_plan, regions, assembler
        self._workers = _count_workers()
        self._buffers: SimpleQueue[Bytes] = SimpleQueue()
        for _ in range(self._workers):
            self._buffers.put(np.empty(limit, np.uint8))

    def copy_units(
        self, work: Iterator[tuple[Slab, ...]], is_due: Callable[[], bool]
    ) -> Iterator[tuple[tuple[Slab, ...], bool]]:
        """Yield each unit that is done, in order, and whether no other is in progress; wait for that if `is_due`."""
        waiting: deque[tuple[tuple[Slab, ...], Future[None]]] = deque()
        with ThreadPoolExecutor(self._workers) as pool:
            for unit in work:
                waiting.append((unit, pool.submit(self._copy_unit, unit)))
                while len(waiting) > self._workers + 1 or (waiting and is_due()):
                    yield self._wait_for_next(waiting)
            while waiting:
                yield self._wait_for_next(waiting)

    @staticmethod
    def _wait_for_next(waiting: deque[tuple[tuple[Slab, ...], Future[None]]]) -> tuple[tuple[Slab, ...], bool]:
        unit, copied = waiting.popleft()
        copied.result()
        return unit, not waiting

    def _copy_unit(self, unit: tuple[Slab, ...]) -> None:
        buffer = self._buffers.get()
        try:
            for slab in unit:
                content = buffer[: slab.size]
                _read_slab(self._copy_plan.sources[slab.source], slab.start, content)
                for part in slab.parts:
                    write_part(part, content, slab.start, self._copy_plan, self._regions, self._assembler)
        finally:
            self._buffers.put(buffer)


def write_part(
    part: StridedCopy, content: Bytes, start: int, copy_plan: CopyPlan, regions: Sequence[Region], assembler: Assembler
) -> None:
    """Write the bytes of a copy to its region: directly, as rows, or through the assembler's blocks.

    Args:
        part: the part of a copy that reads from one slab.
        content: the slab.
        start: the source offset of the slab's first byte.
        copy_plan: the plan of the whole copy.
        regions: the regions of its destinations.
        assembler: the assembler of its narrow destinations.
    """
    region = regions[part.destination]
    if part.destination in copy_plan.narrow_destinations:
        for group in split_row_groups(part):
            if not region.write_rows(group.destination_offset, *view_rows(group, content, start)):
                assembler.add(group, content, start)
    else:
        for offset, contiguous in gather_contiguous(part, content, start):
            region.write(offset, contiguous)


def _read_slab(tensor: StoredTensor, start: int, content: Bytes) -> None:
    with open_descriptor(tensor.file) as descriptor:
        read_exactly(descriptor, content.data, tensor.offset + start, tensor.file)
