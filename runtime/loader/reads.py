"""Plan few, large file reads that cover this rank's strided copies and skip the bytes that it does not need."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import attrgetter
from pathlib import Path

import torch

from runtime.checkpoint.files.safetensors import StoredTensor
from runtime.checkpoint.verifying.fused_sums import Place
from runtime.loader.local_boxes import LocalBox
from runtime.tensor_map.strided_copy import StridedCopy, split_at_blocks

__all__ = [
    "LoadTarget",
    "Read",
    "build_target",
    "compute_buffer_offsets",
    "copy_elements",
    "group_reads",
    "plan_reads",
]

_MAX_GAP = 64 * 2**10
"""Bytes; skipping a smaller gap saves less than the extra call costs."""
_ALIGNMENT = 16
"""Bytes of the widest element."""


@dataclass(frozen=True, slots=True)
class Read:
    """A byte range of a file, and where its bytes go.

    Args:
        file: the file to read.
        start: the offset of the first byte.
        stop: the offset after the last byte.
        parts: the strided copies from this range; their source offsets count from the beginning of the file, their
            destination offsets from the beginning of the whole tensor.
    """

    file: Path
    start: int
    stop: int
    parts: tuple[StridedCopy, ...]

    @property
    def size(self) -> int:
        """The number of bytes to read."""
        return self.stop - self.start


def plan_reads(
    sources: Sequence[StoredTensor], copies: Iterable[StridedCopy], limit: int, is_alone: Callable[[StridedCopy], bool]
) -> Iterator[Read]:
    """Yield reads that cover all strided copies, by file and offset.

    Args:
        sources: the stored tensors that the copies refer to by index.
        copies: the strided copies.
        limit: the maximum number of bytes of a read.
        is_alone: returns whether a part must have a read of its own.
    """
    parts: defaultdict[Path, list[StridedCopy]] = defaultdict(list)
    for copy in copies:
        stored = sources[copy.source]
        for dense in _split_at_gaps(copy):
            for part in _split_by_limit(dense, limit):
                parts[stored.file].append(part._replace(source_offset=stored.offset + part.source_offset))
    for file in sorted(parts):
        in_order = sorted(parts[file], key=attrgetter("source_offset"))
        yield from _merge_reads(file, _join_contiguous(in_order, limit), limit, is_alone)


def group_reads(reads: Iterable[Read], limit: int) -> Iterator[tuple[Read, ...]]:
    """Yield groups of reads that fit into a buffer of `limit` bytes, each read aligned in it."""
    group: list[Read] = []
    used = 0
    for read in reads:
        if group and used + read.size > limit:
            yield tuple(group)
            group, used = [], 0
        group.append(read)
        used += _align_size(read)
    if group:
        yield tuple(group)


def compute_buffer_offsets(group: Iterable[Read]) -> list[int]:
    """Return the offset in the buffer at which each read of a group begins."""
    *offsets, _ = accumulate(map(_align_size, group), initial=0)
    return offsets


def _align_size(read: Read) -> int:
    return read.size + -read.size % _ALIGNMENT


def _split_at_gaps(copy: StridedCopy) -> Iterator[StridedCopy]:
    """Split a strided copy into parts without large gaps between their source bytes."""
    if not _has_gap(copy):
        yield copy
        return
    widest = max(range(len(copy.strides)), key=lambda index: copy.strides[index].source_stride)
    steps, source_stride, destination_stride = copy.strides[widest]
    part = copy._replace(strides=copy.strides[:widest] + copy.strides[widest + 1 :])
    for step in range(steps):
        source_offset = copy.source_offset + step * source_stride
        destination_offset = copy.destination_offset + step * destination_stride
        yield from _split_at_gaps(part._replace(source_offset=source_offset, destination_offset=destination_offset))


def _has_gap(copy: StridedCopy) -> bool:
    span = copy.length
    for stride in sorted(copy.strides, key=lambda stride: stride.source_stride):
        if stride.source_stride - span >= _MAX_GAP:
            return True
        span += (stride.steps - 1) * stride.source_stride
    return False


def _split_by_limit(copy: StridedCopy, limit: int) -> Iterator[StridedCopy]:
    """Split a strided copy into parts that span at most `limit` bytes, at its widest stride if that is small enough."""
    if copy.source_stop - copy.source_offset <= limit:
        yield copy
        return
    widest = max((stride.source_stride for stride in copy.strides), default=1)
    block = limit // widest * widest or limit
    for _, part in split_at_blocks(copy._replace(source_offset=0), block):
        yield part._replace(source_offset=part.source_offset + copy.source_offset)


def _join_contiguous(parts: Iterable[StridedCopy], limit: int) -> Iterator[StridedCopy]:
    """Join parts that follow one another both in the file and in the tensor."""
    last: StridedCopy | None = None
    for part in parts:
        if last is None:
            last = part
        elif (
            not (last.strides or part.strides)
            and last.destination == part.destination
            and last.source_offset + last.length == part.source_offset
            and last.destination_offset + last.length == part.destination_offset
            and last.length + part.length <= limit
        ):
            last = last._replace(length=last.length + part.length)
        else:
            yield last
            last = part
    if last is not None:
        yield last


def _merge_reads(
    file: Path, parts: Iterable[StridedCopy], limit: int, is_alone: Callable[[StridedCopy], bool]
) -> Iterator[Read]:
    group: list[StridedCopy] = []
    stop = 0
    for part in parts:
        if is_alone(part):
            if group and part.source_offset >= stop:  # or a read that goes on behind it would read it again
                yield Read(file, group[0].source_offset, stop, tuple(group))
                group = []
            yield Read(file, part.source_offset, part.source_stop, (part,))
            continue
        if group and not _can_join(part, group, stop, limit):
            yield Read(file, group[0].source_offset, stop, tuple(group))
            group = []
        stop = max(stop, part.source_stop) if group else part.source_stop
        group.append(part)
    if group:
        yield Read(file, group[0].source_offset, stop, tuple(group))


def _can_join(part: StridedCopy, group: Sequence[StridedCopy], stop: int, limit: int) -> bool:
    """Return whether a part can share a read with those before it and stay aligned in the buffer."""
    start = group[0].source_offset
    is_aligned = (part.source_offset - start) % _ALIGNMENT == 0 or part.source == group[-1].source
    return is_aligned and part.source_offset - stop < _MAX_GAP and max(stop, part.source_stop) - start <= limit


_WHOLE = LocalBox()

_WORD_DTYPES: Mapping[int, torch.dtype] = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""The integer dtype to copy elements as, by their size: torch copies these for every stored dtype."""


@dataclass(frozen=True)
class LoadTarget:
    """A tensor in memory to be filled.

    Args:
        memory: the flat tensor, viewed as integers of its element size unless its elements are cast.
        stored: the dtype of the bytes that are read; the same integer dtype unless elements are cast.
        box: where this rank's part of the tensor is in the whole tensor.
        number: the tensor's number among those that are loaded.
    """

    memory: torch.Tensor
    stored: torch.dtype
    box: LocalBox = _WHOLE
    number: int = 0

    def view_bytes(self, part: StridedCopy) -> torch.Tensor | None:
        """Return the bytes of the tensor that a part fills, None unless they are contiguous here and in the file."""
        local = self.box.to_local(part)
        if local.strides or self.memory.dtype != self.stored:
            return None
        return self.memory.view(torch.uint8)[local.destination_offset : local.destination_offset + local.length]

    def locate(self, part: StridedCopy) -> Place | None:
        """Return where in memory a part goes, None if its elements are cast."""
        if self.memory.dtype != self.stored:
            return None
        start, strides = self.box.locate(part)
        return Place(self.memory.data_ptr() + start, strides)


def build_target(local: torch.Tensor, stored: torch.dtype, box: LocalBox = _WHOLE, number: int = 0) -> LoadTarget:
    """Return a target for a tensor.

    Args:
        local: the tensor, which must be contiguous.
        stored: its dtype in the checkpoint.
        box: where this rank's part of the tensor is in the whole tensor.
        number: the tensor's number among those that are loaded.
    """
    memory = local.view(-1)
    if local.dtype != stored:
        return LoadTarget(memory, stored, box, number)
    word = _WORD_DTYPES[stored.itemsize]
    return LoadTarget(memory.view(word), word, box, number)


def copy_elements(part: StridedCopy, buffer: torch.Tensor, start: int, target: LoadTarget) -> None:
    """Copy a part's elements from a buffer into the target.

    Args:
        part: a part of a read.
        buffer: the bytes that were read, on the target's device.
        start: the file offset that the buffer's first byte corresponds to.
        target: the tensor to fill.
    """
    size, part = target.stored.itemsize, target.box.to_local(part)
    shape = (*(stride.steps for stride in part.strides), part.length // size)
    source_strides = (*(stride.source_stride // size for stride in part.strides), 1)
    target_strides = (*(stride.destination_stride // size for stride in part.strides), 1)
    source_offset, remainder = divmod(part.source_offset - start, size)
    assert not remainder, "a read begins at an element"
    target_offset = target.memory.storage_offset() + part.destination_offset // size
    elements = buffer.view(target.stored).as_strided(shape, source_strides, source_offset)
    target.memory.as_strided(shape, target_strides, target_offset).copy_(elements, non_blocking=True)
