"""Strided copies on buffers: bytes as views, gathered into contiguous ranges or scattered to their places."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.checkpoint.scratch import Scratch
from runtime.tensor_map.strided_copy import StridedCopy, reverse

__all__ = ["Bytes", "gather_contiguous", "get_contiguous_size", "is_equal", "scatter", "split_row_groups", "view_rows"]

Bytes = NDArray[np.uint8]

_WORDS = (8, 4, 2, 1)
_SCRATCH = Scratch()


def get_contiguous_size(copy: StridedCopy) -> int:
    """Return how many bytes of a copy are contiguous in the destination, wherever they are in the source."""
    return _split_contiguous(copy)[1]


def gather_contiguous(copy: StridedCopy, slab: Bytes, start: int) -> Iterator[tuple[int, Bytes]]:
    """Yield (destination offset, contiguous bytes) of a copy, gathering what is strided only in the source.

    The bytes are valid until the next ones are asked for.

    Args:
        copy: the copy to split.
        slab: the bytes of the source that it reads.
        start: the source offset of the slab's first byte.
    """
    inner, _ = _split_contiguous(copy)
    view = _view_source(copy, slab, start, _choose_word_size(copy.length, *(s.source_stride for s in copy.strides)))
    for index, offset in _iter_outer_steps(copy, inner):
        source = view[index]
        if not source.flags.c_contiguous:
            gathered = _SCRATCH.get_array(source.shape, source.dtype)
            gathered[...] = source
            source = gathered
        yield offset, source.reshape(-1).view(np.uint8)


def split_row_groups(copy: StridedCopy) -> Iterator[StridedCopy]:
    """Yield the copy in parts whose gaps in the destination all have one width."""
    inner, _ = _split_contiguous(copy)
    outer, rest = copy.strides[: max(0, inner - 1)], copy.strides[max(0, inner - 1) :]
    for index, offset in _iter_outer_steps(copy, len(outer)):
        skipped = sum(step * stride.source_stride for step, stride in zip(index, outer, strict=True))
        yield copy._replace(source_offset=copy.source_offset + skipped, destination_offset=offset, strides=rest)


def view_rows(group: StridedCopy, slab: Bytes, start: int) -> tuple[NDArray[Any], int]:
    """Return a group as rows of words, and the distance of the rows in the destination in bytes.

    Args:
        group: one of `split_row_groups`.
        slab: the bytes of the source that it reads.
        start: the source offset of the slab's first byte.
    """
    inner, size = _split_contiguous(group)
    word = _choose_word_size(group.length, *(stride.source_stride for stride in group.strides))
    steps, stride = (group.strides[0].steps, group.strides[0].destination_stride) if inner else (1, size)
    return _view_source(group, slab, start, word).reshape(steps, size // word), stride


def scatter(copy: StridedCopy, slab: Bytes, start: int, block: Bytes, block_start: int) -> None:
    """Copy bytes to their places in a block of the destination.

    Args:
        copy: a copy that writes to this block only.
        slab: the bytes of the source that it reads.
        start: the source offset of the slab's first byte.
        block: the block of the destination.
        block_start: the destination offset of the block's first byte.
    """
    source, target = _view_both_ends(copy, slab, start, block, block_start)
    target[...] = source


def is_equal(copy: StridedCopy, slab: Bytes, start: int, block: Bytes, block_start: int) -> bool:
    """Return whether a block of the destination has the copied bytes at their places; arguments as for `scatter`."""
    source, target = _view_both_ends(copy, slab, start, block, block_start)
    return bool(np.array_equal(source, target))


def _view_both_ends(
    copy: StridedCopy, slab: Bytes, start: int, block: Bytes, block_start: int
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return both ends of a copy as words of one width."""
    word = _choose_word_size(copy.length, *(number for stride in copy.strides for number in stride[1:]))
    return _view_source(copy, slab, start, word), _view_source(reverse(copy), block, block_start, word)


def _split_contiguous(copy: StridedCopy) -> tuple[int, int]:
    """Return how many outer strides leave gaps in the destination, and how many bytes are contiguous within."""
    inner, size = len(copy.strides), copy.length
    while inner and copy.strides[inner - 1].destination_stride == size:
        inner -= 1
        size *= copy.strides[inner].steps
    return inner, size


def _iter_outer_steps(copy: StridedCopy, outer: int) -> Iterator[tuple[tuple[int, ...], int]]:
    """Yield (index, destination offset) of every step of the outer strides."""
    strides = copy.strides[:outer]
    for index in np.ndindex(*(stride.steps for stride in strides)):
        distance = sum(step * stride.destination_stride for step, stride in zip(index, strides, strict=True))
        yield index, copy.destination_offset + distance


def _choose_word_size(*numbers: int) -> int:
    """Return the size of the widest word by which all lengths and strides divide."""
    return next(size for size in _WORDS if all(number % size == 0 for number in numbers))


def _view_source(copy: StridedCopy, buffer: Bytes, start: int, word: int) -> NDArray[Any]:
    """Return the copy's source bytes as words, with one dim per stride and one for contiguous words."""
    return np.ndarray(
        (*(stride.steps for stride in copy.strides), copy.length // word),
        f"<u{word}",
        buffer=buffer.data,
        offset=copy.source_offset - start,
        strides=(*(s.source_stride for s in copy.strides), word),
    )
