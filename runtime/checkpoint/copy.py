"""Executing a run table: each source byte is read once, in slabs, and goes from there to all that need it."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import cycle, groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from plans.errors import UsageError
from runtime.checkpoint.extents import Form
from runtime.checkpoint.runs import Run, covers, cut, runs_of
from runtime.checkpoint.safetensors import BITS, StoredTensor, read_exactly, reading
from runtime.proof import prove

__all__ = ["DEFAULT_MEMORY", "Bytes", "Destination", "Progress", "Sink", "Table", "build_table", "execute"]

Bytes = NDArray[np.uint8]
Sink = Callable[[int, Bytes], None]
"""Takes contiguous bytes and their offset in the destination region."""
Progress = Callable[[int, int, str], None]
"""Told bytes done, bytes in all, and the tensor at hand."""

DEFAULT_MEMORY = 256 * 2**20
_SLAB = 8 * 2**20
"""Slabs of this size stay in the processor's cache from reading to writing; larger ones are slower."""
_LEAST_MEMORY = 2**20


@dataclass(frozen=True, slots=True)
class Destination:
    """A region that runs fill: a tensor in a file, or a parameter's logical bytes that only a digest sees.

    Args:
        name: of the tensor.
        size: in bytes.
        file: the file's name, or None where nothing is written.
        offset: of the region in the file.
    """

    name: str
    size: int
    file: str | None = None
    offset: int = 0


@dataclass(frozen=True)
class Table:
    """Runs between stored tensors and destinations, proven to fill every destination exactly once."""

    sources: tuple[StoredTensor, ...]
    destinations: tuple[Destination, ...]
    runs: tuple[Run, ...]

    @property
    def bytes_written(self) -> int:
        """Bytes that go to files."""
        return sum(destination.size for destination in self.destinations if destination.file is not None)


def build_table(sources: Mapping[str, StoredTensor], wanted: Sequence[tuple[Destination, Form]]) -> Table:
    """Compose the run table of the destinations and prove it.

    Args:
        sources: stored tensors by the names that the forms use.
        wanted: each destination with the form of the tensor it receives.

    Raises:
        FormError: a tensor of elements smaller than a byte is cut within one.
    """
    numbers = {name: number for number, name in enumerate(sources)}
    bits = {name: BITS[tensor.dtype] for name, tensor in sources.items()}
    runs = [
        run
        for number, (_, form) in enumerate(wanted)
        for run in runs_of(form, bits[form.sources[0]] if form.extents else 8, numbers, number)
    ]
    destinations = tuple(destination for destination, _ in wanted)
    sizes = {number: destination.size for number, destination in enumerate(destinations)}
    prove(covers(runs, sizes), "the run table does not write every byte exactly once")
    return Table(tuple(sources.values()), destinations, tuple(runs))


def execute(
    table: Table, sinks: Sequence[Sink], *, max_memory: int = DEFAULT_MEMORY, progress: Progress | None = None
) -> int:
    """Read every source once and feed each destination's sink.

    Args:
        table: what to move.
        sinks: one for each destination of the table; those without a file are fed on one other thread.
        max_memory: bytes that buffers may take.
        progress: told after every slab.

    Returns:
        The bytes read.

    Raises:
        UsageError: the memory is too small to work with.
        IncompleteError: a source file ends before its tensors do.
        CheckpointError: a source file cannot be read.
    """
    if max_memory < _LEAST_MEMORY:
        raise UsageError(f"{max_memory} bytes are too little memory to copy with", hint="allow 1 MiB or more")
    # Two slabs and a gathered copy of each are alive at a time, and a digest's scratch.
    slabs = [_Slab(np.empty(min(_SLAB, max_memory // 5), np.uint8)) for _ in range(2)]
    total, done, read = table.bytes_written, 0, 0
    with ThreadPoolExecutor(1) as digesting:
        jobs = _cut(table, len(slabs[0].buffer))
        for slab, (tensor, descriptor, start, parts) in zip(cycle(slabs), jobs, strict=False):
            content = slab.filled(tensor, descriptor, start, max(part.source_stop for part in parts))
            written = [part for part in parts if table.destinations[part.destination].file is not None]
            digested = [part for part in parts if table.destinations[part.destination].file is None]
            slab.digesting = digesting.submit(_feed, digested, content, start, sinks)
            _feed(written, content, start, sinks)
            read += len(content)
            done += sum(part.size for part in written)
            if progress is not None:
                progress(done, total, table.destinations[parts[0].destination].name)
        for slab in slabs:
            slab.wait()
    return read


@dataclass(slots=True)
class _Slab:
    """A buffer; what only digests see is summed on a second thread while the other slab is read and written."""

    buffer: Bytes
    digesting: Future[None] | None = None

    def wait(self) -> None:
        if self.digesting is not None:
            self.digesting.result()

    def filled(self, tensor: StoredTensor, descriptor: int, start: int, stop: int) -> Bytes:
        self.wait()
        content = self.buffer[: stop - start]
        read_exactly(descriptor, content.data, tensor.offset + start, tensor.file)
        return content


def _feed(parts: Sequence[Run], content: Bytes, start: int, sinks: Sequence[Sink]) -> None:
    for part in parts:
        for offset, piece in _pieces(part, content, start):
            sinks[part.destination](offset, piece)


def _cut(table: Table, limit: int) -> Iterator[tuple[StoredTensor, int, int, list[Run]]]:
    """Yield (source, its open file, first byte, parts of runs) of slabs of at most `limit` bytes, in file order."""
    for tensor, descriptor, runs in _by_source(table):
        for start, parts in _slabs(tensor, runs, limit):
            yield tensor, descriptor, start, parts


def _by_source(table: Table) -> Iterator[tuple[StoredTensor, int, list[Run]]]:
    """Yield each source with its open file and its runs, files one after the other in the order of their bytes."""
    runs: defaultdict[int, list[Run]] = defaultdict(list)
    for run in table.runs:
        runs[run.source].append(run)

    def place(number: int) -> tuple[Path, int]:
        return table.sources[number].file, table.sources[number].offset

    for file, numbers in groupby(sorted(runs, key=place), key=lambda number: table.sources[number].file):
        with ExitStack() as stack:
            with reading(file):
                descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, descriptor)
            for number in numbers:
                yield table.sources[number], descriptor, runs[number]


def _slabs(tensor: StoredTensor, runs: Sequence[Run], limit: int) -> Iterator[tuple[int, list[Run]]]:
    """Yield (first source byte, parts of runs) of slabs of at most `limit` bytes that together hold all runs."""
    block = _block(tensor, limit)
    slabs: defaultdict[int, list[Run]] = defaultdict(list)
    for run in runs:
        for number, part in cut(run, block):
            slabs[number].append(part)
    for number in sorted(slabs):
        yield min(part.source_offset for part in slabs[number]), slabs[number]


def _block(tensor: StoredTensor, limit: int) -> int:
    """Return a slab size that ends between rows of the tensor where rows are small enough."""
    unit = tensor.size
    for count in tensor.shape:
        if unit <= limit:
            return limit // unit * unit
        unit //= count
    return limit


def _pieces(run: Run, slab: Bytes, start: int) -> Iterator[tuple[int, Bytes]]:
    """Yield (offset in the destination, contiguous bytes) of a run, gathering what is strided only in the source."""
    width, inner = run.length, len(run.repeats)
    while inner and run.repeats[inner - 1].destination_stride == width:
        inner -= 1
        width *= run.repeats[inner].steps
    view = _view(run, slab, start)
    outer = run.repeats[:inner]
    for index in np.ndindex(*(repeat.steps for repeat in outer)):
        offset = sum(step * repeat.destination_stride for step, repeat in zip(index, outer, strict=True))
        piece = np.ascontiguousarray(view[index]).reshape(-1).view(np.uint8)
        yield run.destination_offset + offset, piece


def _view(run: Run, slab: Bytes, start: int) -> NDArray[Any]:
    """Return the run's source bytes as a strided view, in the widest words that lengths and strides allow."""
    strides = tuple(repeat.source_stride for repeat in run.repeats)
    word = next(size for size in (8, 4, 2, 1) if all(number % size == 0 for number in (run.length, *strides)))
    return np.ndarray(
        (*(repeat.steps for repeat in run.repeats), run.length // word),
        f"<u{word}",
        buffer=slab.data,
        offset=run.source_offset - start,
        strides=(*strides, word),
    )
