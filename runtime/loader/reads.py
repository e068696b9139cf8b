"""Reads: the runs of a rank's local tensors as few ranges of files, what the rank does not hold left out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch

from runtime.checkpoint.files.safetensors import StoredTensor
from runtime.tensor_map.strided_copy import StridedCopy, split_at_blocks

__all__ = ["LoadTarget", "Read", "build_target", "compute_buffer_offsets", "copy_elements", "group_reads", "plan_reads"]


_MAX_GAP = 64 * 2**10
"""Bytes; leaving out fewer costs more by the call than it saves."""
_ALIGNMENT = 16
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
    parts: tuple[StridedCopy, ...]

    @property
    def size(self) -> int:
        """The bytes to read."""
        return self.stop - self.start


def plan_reads(
    sources: Sequence[StoredTensor], copies: Iterable[StridedCopy], limit: int, is_alone: Callable[[StridedCopy], bool]
) -> Iterator[Read]:
    """Yield the reads of some runs, in the order of the files' bytes.

    Args:
        sources: stored tensors by the number that runs use.
        copies: to bring.
        limit: bytes of a read.
        is_alone: says of a part that nothing may be read along with it.
    """
    found: defaultdict[Path, list[StridedCopy]] = defaultdict(list)
    for run in copies:
        stored = sources[run.source]
        for dense in _split_at_gaps(run):
            for part in _split_by_limit(dense, limit):
                found[stored.file].append(part._replace(source_offset=stored.offset + part.source_offset))
    for file in sorted(found):
        yield from _merge_reads(file, sorted(found[file], key=lambda part: part.source_offset), limit, is_alone)


def group_reads(reads: Iterable[Read], limit: int) -> Iterator[tuple[Read, ...]]:
    """Yield reads in groups that fit into a buffer of `limit` bytes, each begun at an aligned place of it."""
    group: list[Read] = []
    filled = 0
    for read in reads:
        if group and filled + read.size > limit:
            yield tuple(group)
            group, filled = [], 0
        group.append(read)
        filled += _align_size(read)
    if group:
        yield tuple(group)


def compute_buffer_offsets(group: Iterable[Read]) -> list[int]:
    """Return where in their buffer the reads of a unit begin."""
    *begins, _ = accumulate(map(_align_size, group), initial=0)
    return begins


def _align_size(read: Read) -> int:
    return read.size + -read.size % _ALIGNMENT


def _split_at_gaps(copy: StridedCopy) -> Iterator[StridedCopy]:
    """Yield a run in parts that leave out no more than a little of what lies between their bytes."""
    if not _has_gap(copy):
        yield copy
        return
    widest = max(range(len(copy.strides)), key=lambda index: copy.strides[index].source_stride)
    steps, inward, outward = copy.strides[widest]
    others = copy.strides[:widest] + copy.strides[widest + 1 :]
    for step in range(steps):
        begin = copy.source_offset + step * inward, copy.destination_offset + step * outward
        yield from _split_at_gaps(copy._replace(source_offset=begin[0], destination_offset=begin[1], strides=others))


def _has_gap(copy: StridedCopy) -> bool:
    span = copy.length
    for repeat in sorted(copy.strides, key=lambda repeat: repeat.source_stride):
        if repeat.source_stride - span >= _MAX_GAP:
            return True
        span += (repeat.steps - 1) * repeat.source_stride
    return False


def _split_by_limit(copy: StridedCopy, limit: int) -> Iterator[StridedCopy]:
    """Yield a run in parts that span up to `limit` bytes, between its widest steps where these are small enough."""
    if copy.source_stop - copy.source_offset <= limit:
        yield copy
        return
    widest = max((repeat.source_stride for repeat in copy.strides), default=1)
    block = limit // widest * widest or limit
    for _, part in split_at_blocks(copy._replace(source_offset=0), block):
        yield part._replace(source_offset=part.source_offset + copy.source_offset)


def _merge_reads(
    file: Path, parts: Iterable[StridedCopy], limit: int, is_alone: Callable[[StridedCopy], bool]
) -> Iterator[Read]:
    group: list[StridedCopy] = []
    stop = 0
    for part in parts:
        if is_alone(part):
            yield Read(file, part.source_offset, part.source_stop, (part,))
            continue
        if group and not _can_join(part, group, stop, limit):
            yield Read(file, group[0].source_offset, stop, tuple(group))
            group, stop = [], 0
        group.append(part)
        stop = max(stop, part.source_stop)
    if group:
        yield Read(file, group[0].source_offset, stop, tuple(group))


def _can_join(part: StridedCopy, group: Sequence[StridedCopy], stop: int, limit: int) -> bool:
    """Return whether a part may be read together with those before it, its elements aligned in the buffer."""
    start = group[0].source_offset
    is_aligned = (part.source_offset - start) % _ALIGNMENT == 0 or part.source == group[-1].source
    return is_aligned and part.source_offset - stop < _MAX_GAP and max(stop, part.source_stop) - start <= limit


_WORD_DTYPES: Mapping[int, torch.dtype] = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""What elements are moved as, by their bytes: torch copies these whatever the elements mean."""


@dataclass(frozen=True)
class LoadTarget:
    """A tensor in memory that is to be filled.

    Args:
        memory: its elements in a row, as words of their size, or as numbers where they are cast.
        stored: the dtype of what is read, a word's where nothing is cast.
    """

    memory: torch.Tensor
    stored: torch.dtype

    def can_copy_bytes(self, part: StridedCopy) -> bool:
        """Return whether a part's bytes go to the tensor as they are, one after the other."""
        return not part.strides and self.memory.dtype == self.stored

    def view_bytes(self, part: StridedCopy) -> torch.Tensor:
        """Return where such a part's bytes go."""
        return self.memory.view(torch.uint8)[part.destination_offset : part.destination_offset + part.length]


def build_target(local: torch.Tensor, stored: torch.dtype) -> LoadTarget:
    """Return a contiguous tensor as a target.

    Args:
        local: the tensor.
        stored: the dtype in the checkpoint.
    """
    memory = local.view(-1)
    if local.dtype != stored:
        return LoadTarget(memory, stored)
    word = _WORD_DTYPES[stored.itemsize]
    return LoadTarget(memory.view(word), word)


def copy_elements(part: StridedCopy, buffer: torch.Tensor, start: int, target: LoadTarget) -> None:
    """Copy a part's elements from a buffer to where they belong.

    Args:
        part: of a read.
        buffer: of bytes, on the target's device.
        start: which byte of the file the buffer's first one is; none of the file's where reads share a buffer.
        target: that the part is of.
    """
    size = target.stored.itemsize
    shape = (*(repeat.steps for repeat in part.strides), part.length // size)
    inward = (*(repeat.source_stride // size for repeat in part.strides), 1)
    outward = (*(repeat.destination_stride // size for repeat in part.strides), 1)
    begin, rest = divmod(part.source_offset - start, size)
    assert not rest, "reads begin where an element does"
    found = buffer.view(target.stored).as_strided(shape, inward, begin)
    target.memory.as_strided(shape, outward, target.memory.storage_offset() + part.destination_offset // size).copy_(
        found, non_blocking=True
    )
