"""Reads: the runs of a rank's local tensors as few ranges of files, what the rank does not hold left out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from runtime.checkpoint.files.safetensors import StoredTensor
from runtime.extents.runs import Run, cut

__all__ = ["Read", "positions", "reads", "units"]

_GAP = 64 * 2**10
"""Bytes; leaving out fewer costs more by the call than it saves."""
_ALIGNED = 16
"""The bytes of the widest element."""


@dataclass(frozen=True, slots=True)
class Read:
    """A range of a file, and where its bytes go.

    Args:
        file: to read.
        start: of the first byte in the file.
        stop: behind the last one.
        parts: runs whose source offsets count from the file's first byte.
    """

    file: Path
    start: int
    stop: int
    parts: tuple[Run, ...]

    @property
    def size(self) -> int:
        """The bytes to read."""
        return self.stop - self.start


def reads(
    sources: Sequence[StoredTensor], runs: Iterable[Run], limit: int, is_alone: Callable[[Run], bool]
) -> Iterator[Read]:
    """Yield the reads of some runs, in the order of the files' bytes.

    Args:
        sources: stored tensors by the number that runs use.
        runs: to bring.
        limit: bytes of a read.
        is_alone: says of a part that nothing may be read along with it.
    """
    found: defaultdict[Path, list[Run]] = defaultdict(list)
    for run in runs:
        stored = sources[run.source]
        for dense in _without_gaps(run):
            for part in _cut(dense, limit):
                found[stored.file].append(part._replace(source_offset=stored.offset + part.source_offset))
    for file in sorted(found):
        yield from _merged(file, sorted(found[file], key=lambda part: part.source_offset), limit, is_alone)


def units(found: Iterable[Read], limit: int) -> Iterator[tuple[Read, ...]]:
    """Yield reads in groups that fit into a buffer of `limit` bytes, each begun at an aligned place of it."""
    group: list[Read] = []
    filled = 0
    for read in found:
        if group and filled + read.size > limit:
            yield tuple(group)
            group, filled = [], 0
        group.append(read)
        filled += _padded(read)
    if group:
        yield tuple(group)


def positions(unit: Iterable[Read]) -> list[int]:
    """Return where in their buffer the reads of a unit begin."""
    *begins, _ = accumulate(map(_padded, unit), initial=0)
    return begins


def _padded(read: Read) -> int:
    return read.size + -read.size % _ALIGNED


def _without_gaps(run: Run) -> Iterator[Run]:
    """Yield a run in parts that leave out no more than a little of what lies between their bytes."""
    if not _has_gap(run):
        yield run
        return
    widest = max(range(len(run.repeats)), key=lambda index: run.repeats[index].source_stride)
    steps, inward, outward = run.repeats[widest]
    others = run.repeats[:widest] + run.repeats[widest + 1 :]
    for step in range(steps):
        begin = run.source_offset + step * inward, run.destination_offset + step * outward
        yield from _without_gaps(run._replace(source_offset=begin[0], destination_offset=begin[1], repeats=others))


def _has_gap(run: Run) -> bool:
    span = run.length
    for repeat in sorted(run.repeats, key=lambda repeat: repeat.source_stride):
        if repeat.source_stride - span >= _GAP:
            return True
        span += (repeat.steps - 1) * repeat.source_stride
    return False


def _cut(run: Run, limit: int) -> Iterator[Run]:
    """Yield a run in parts that span up to `limit` bytes, between its widest steps where these are small enough."""
    if run.source_stop - run.source_offset <= limit:
        yield run
        return
    widest = max((repeat.source_stride for repeat in run.repeats), default=1)
    block = limit // widest * widest or limit
    for _, part in cut(run._replace(source_offset=0), block):
        yield part._replace(source_offset=part.source_offset + run.source_offset)


def _merged(file: Path, parts: Iterable[Run], limit: int, is_alone: Callable[[Run], bool]) -> Iterator[Read]:
    group: list[Run] = []
    stop = 0
    for part in parts:
        if is_alone(part):
            yield Read(file, part.source_offset, part.source_stop, (part,))
            continue
        if group and not _joins(part, group, stop, limit):
            yield Read(file, group[0].source_offset, stop, tuple(group))
            group, stop = [], 0
        group.append(part)
        stop = max(stop, part.source_stop)
    if group:
        yield Read(file, group[0].source_offset, stop, tuple(group))


def _joins(part: Run, group: Sequence[Run], stop: int, limit: int) -> bool:
    """Return whether a part may be read together with those before it, its elements aligned in the buffer."""
    start = group[0].source_offset
    is_aligned = (part.source_offset - start) % _ALIGNED == 0 or part.source == group[-1].source
    return is_aligned and part.source_offset - stop < _GAP and max(stop, part.source_stop) - start <= limit
