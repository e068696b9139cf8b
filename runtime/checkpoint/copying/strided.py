"""Runs on buffers: their bytes as views, gathered into contiguous pieces or scattered to where they belong."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.extents.runs import Run, flipped

__all__ = ["Bytes", "equal", "pieces", "row_groups", "rows", "scatter", "width"]

Bytes = NDArray[np.uint8]

_WORDS = (8, 4, 2, 1)


def width(run: Run) -> int:
    """Return the bytes of a run that are contiguous in the destination, gathered from wherever they lie."""
    return _contiguous(run)[1]


def pieces(run: Run, slab: Bytes, start: int) -> Iterator[tuple[int, Bytes]]:
    """Yield (offset in the destination, contiguous bytes) of a run, gathering what is strided only in the source.

    Args:
        run: to take apart.
        slab: of the source, as far as the run needs it.
        start: the source offset of the slab's first byte.
    """
    inner, _ = _contiguous(run)
    view = _view(run, slab, start, _word(run.length, *(repeat.source_stride for repeat in run.repeats)))
    for index, offset in _places(run, inner):
        yield offset, np.ascontiguousarray(view[index]).reshape(-1).view(np.uint8)


def row_groups(run: Run) -> Iterator[Run]:
    """Yield the run in parts that each have gaps of one width at most in the destination."""
    inner, _ = _contiguous(run)
    outer, rest = run.repeats[: max(0, inner - 1)], run.repeats[max(0, inner - 1) :]
    for index, offset in _places(run, len(outer)):
        skipped = sum(step * repeat.source_stride for step, repeat in zip(index, outer, strict=True))
        yield run._replace(source_offset=run.source_offset + skipped, destination_offset=offset, repeats=rest)


def rows(group: Run, slab: Bytes, start: int) -> tuple[NDArray[Any], int]:
    """Return a group as rows of words, and the bytes from row to row in the destination.

    Args:
        group: one of `row_groups`.
        slab: of the source.
        start: the source offset of the slab's first byte.
    """
    inner, size = _contiguous(group)
    word = _word(group.length, *(repeat.source_stride for repeat in group.repeats))
    steps, stride = (group.repeats[0].steps, group.repeats[0].destination_stride) if inner else (1, size)
    return _view(group, slab, start, word).reshape(steps, size // word), stride


def scatter(run: Run, slab: Bytes, start: int, block: Bytes, block_start: int) -> None:
    """Copy a run's bytes to their places in a block of the destination.

    Args:
        run: that ends wholly in the block.
        slab: of the source.
        start: the source offset of the slab's first byte.
        block: of the destination.
        block_start: the destination offset of the block's first byte.
    """
    source, target = _both(run, slab, start, block, block_start)
    target[...] = source


def equal(run: Run, slab: Bytes, start: int, block: Bytes, block_start: int) -> bool:
    """Return whether a block of the destination has a run's bytes at their places; arguments as for `scatter`."""
    source, target = _both(run, slab, start, block, block_start)
    return bool(np.array_equal(source, target))


def _both(run: Run, slab: Bytes, start: int, block: Bytes, block_start: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return both ends of a run as words of one width."""
    word = _word(run.length, *(number for repeat in run.repeats for number in repeat[1:]))
    return _view(run, slab, start, word), _view(flipped(run), block, block_start, word)


def _contiguous(run: Run) -> tuple[int, int]:
    """Return how many outer repeats leave gaps in the destination, and the bytes that are contiguous within them."""
    inner, size = len(run.repeats), run.length
    while inner and run.repeats[inner - 1].destination_stride == size:
        inner -= 1
        size *= run.repeats[inner].steps
    return inner, size


def _places(run: Run, outer: int) -> Iterator[tuple[tuple[int, ...], int]]:
    """Yield (index, destination offset) of every step of the outer repeats."""
    repeats = run.repeats[:outer]
    for index in np.ndindex(*(repeat.steps for repeat in repeats)):
        distance = sum(step * repeat.destination_stride for step, repeat in zip(index, repeats, strict=True))
        yield index, run.destination_offset + distance


def _word(*numbers: int) -> int:
    """Return the widest word that lengths and strides allow."""
    return next(size for size in _WORDS if all(number % size == 0 for number in numbers))


def _view(run: Run, buffer: Bytes, start: int, word: int) -> NDArray[Any]:
    """Return the run's source bytes as words, one dim for each repeat and one for the words of a block."""
    return np.ndarray(
        (*(repeat.steps for repeat in run.repeats), run.length // word),
        f"<u{word}",
        buffer=buffer.data,
        offset=run.source_offset - start,
        strides=(*(repeat.source_stride for repeat in run.repeats), word),
    )
