"""Strided copies: what a tensor map means in bytes, and the proof that copies write every byte exactly once.

A strided copy moves a strided block of bytes from a source region to a destination region. Regions are byte ranges such
as a stored tensor in a file, a local tensor in a rank's file, or a parameter's logical bytes that a digest reads.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from runtime.tensor_map.tensor_map import StridedBox, TensorMap, TensorMapError, row_major

__all__ = ["Stride", "StridedCopy", "covers", "plan_copies", "reverse", "split_at_blocks"]


class Stride(NamedTuple):
    """A block that is repeated `steps` times, at these distances in bytes in the source and in the destination."""

    steps: int
    source_stride: int
    destination_stride: int

    @property
    def outer_strides(self) -> tuple[int, int]:
        """The strides of an outer repetition that would merely continue this one."""
        return self.steps * self.source_stride, self.steps * self.destination_stride


class StridedCopy(NamedTuple):
    """`length` contiguous bytes, repeated; offsets in bytes from the beginning of the two regions.

    `strides` are nested, outermost first, with destination strides that never grow inwards.
    """

    source: int
    source_offset: int
    destination: int
    destination_offset: int
    length: int
    strides: tuple[Stride, ...] = ()

    @property
    def size(self) -> int:
        """The number of bytes copied."""
        size = self.length
        for stride in self.strides:
            size *= stride.steps
        return size

    @property
    def source_stop(self) -> int:
        """The end of the source bytes that the copy spans."""
        return self.source_offset + self.length + sum((s.steps - 1) * s.source_stride for s in self.strides)


class _WritePattern(NamedTuple):
    """The destination side of a copy: `length` bytes at `start`, repeated by (count, stride), outermost first."""

    start: int
    strides: tuple[tuple[int, int], ...]
    length: int

    @property
    def stop(self) -> int:
        return self.start + self.length + sum((count - 1) * stride for count, stride in self.strides)


def plan_copies(
    tensor_map: TensorMap, bits: int, sources: Mapping[str, int], destination: int
) -> Iterator[StridedCopy]:
    """Yield the copies that build a tensor, one for each box.

    Args:
        tensor_map: the tensor map of the tensor.
        bits: the bits of one element; a byte that holds several elements may not be cut.
        sources: the number of each source's region by name.
        destination: the number of the region that the tensor is written to, row-major from its first byte.

    Raises:
        TensorMapError: a box begins or ends inside a byte.
    """
    strides = row_major(tensor_map.shape)
    for box in tensor_map.boxes:
        yield _plan_copy(box, strides, bits, sources[box.source], destination)


def _plan_copy(box: StridedBox, strides: Sequence[int], bits: int, source: int, destination: int) -> StridedCopy:
    # Spelled out, because a large model has a hundred thousand boxes: whole bytes are counted as such, others as bits.
    size, unit = (bits, 8) if bits % 8 else (bits // 8, 1)
    length, repeats, start = size, list[tuple[int, int, int]](), 0
    for dim in range(len(strides) - 1, -1, -1):
        outward = strides[dim] * size
        start += box.offset[dim] * outward
        count = box.shape[dim]
        if count == 1:
            continue
        inward, outward = box.strides[dim] * size, outward * box.steps[dim]
        if not repeats and inward == outward == length:
            length *= count
        elif repeats and inward == repeats[-1][0] * repeats[-1][1] and outward == repeats[-1][0] * repeats[-1][2]:
            repeats[-1] = (repeats[-1][0] * count, repeats[-1][1], repeats[-1][2])
        else:
            repeats.append((count, inward, outward))
    base = box.base * size
    if unit == 8:
        if any(n % 8 for n in (base, start, length, *(n for _, *pair in repeats for n in pair))):
            raise TensorMapError(f"elements of {bits} bits are cut within a byte")
        base, start, length = base // 8, start // 8, length // 8
        repeats = [(count, inward // 8, outward // 8) for count, inward, outward in repeats]
    return StridedCopy(
        source, base, destination, start, length, tuple([Stride(*repeat) for repeat in reversed(repeats)])
    )


def split_at_blocks(copy: StridedCopy, block: int) -> Iterator[tuple[int, StridedCopy]]:
    """Yield the copy in parts that each read from one block of the source, with that block's number.

    Args:
        copy: the strided copy to split.
        block: bytes; block n is `[n * block, (n + 1) * block)` of the source region.
    """
    if copy.strides and copy.source_stop > (copy.source_offset // block + 1) * block:
        yield from _split_steps(copy, block)
        return
    while copy.source_stop > (boundary := (copy.source_offset // block + 1) * block):
        head = boundary - copy.source_offset
        yield copy.source_offset // block, copy._replace(length=head)
        rest = copy.destination_offset + head
        copy = copy._replace(source_offset=boundary, destination_offset=rest, length=copy.length - head)
    yield copy.source_offset // block, copy


def _split_steps(copy: StridedCopy, block: int) -> Iterator[tuple[int, StridedCopy]]:
    """Cut between the steps of the widest source stride; a step that itself crosses a boundary is cut further."""
    widest = max(range(len(copy.strides)), key=lambda index: copy.strides[index].source_stride)
    count, inward, outward = copy.strides[widest]
    others = copy.strides[:widest] + copy.strides[widest + 1 :]
    span = copy.source_stop - copy.source_offset - (count - 1) * inward
    done = 0
    while done < count:
        start = copy.source_offset + done * inward
        number = start // block
        fitting = ((number + 1) * block - start - span) // inward + 1
        steps = max(1, min(fitting, count - done))
        repeats = (*copy.strides[:widest], Stride(steps, inward, outward), *copy.strides[widest + 1 :])
        part = copy._replace(
            source_offset=start,
            destination_offset=copy.destination_offset + done * outward,
            strides=repeats if steps > 1 else others,
        )
        if fitting > 0:
            yield number, part
        else:
            yield from split_at_blocks(part, block)
        done += steps


def reverse(copy: StridedCopy) -> StridedCopy:
    """Return the copy that moves the same bytes back."""
    strides = tuple(Stride(r.steps, r.destination_stride, r.source_stride) for r in copy.strides)
    return StridedCopy(copy.destination, copy.destination_offset, copy.source, copy.source_offset, copy.length, strides)


def covers(copies: Iterable[StridedCopy], sizes: Mapping[int, int]) -> bool:
    """Return whether copies write every byte of every destination region exactly once.

    Args:
        copies: all copies.
        sizes: the bytes of each destination region.
    """
    patterns: defaultdict[int, list[_WritePattern]] = defaultdict(list)
    for copy in copies:
        patterns[copy.destination].append(_build_write_pattern(copy))
    return patterns.keys() <= sizes.keys() and all(_tiles(patterns[d], size) for d, size in sizes.items())


def _build_write_pattern(copy: StridedCopy) -> _WritePattern:
    length, repeats = copy.length, list[tuple[int, int]]()
    for count, _, stride in reversed(copy.strides):
        if not repeats and stride == length:
            length *= count
        elif repeats and stride == repeats[-1][0] * repeats[-1][1]:
            repeats[-1] = (repeats[-1][0] * count, repeats[-1][1])
        else:
            repeats.append((count, stride))
    return _WritePattern(copy.destination_offset, tuple(reversed(repeats)), length)


def _tiles(patterns: Sequence[_WritePattern], size: int) -> bool:
    """Return whether the patterns cover `[0, size)` exactly once.

    Dense patterns must follow one another. Otherwise the widest stride folds the range into rows. Between two rows
    in which a pattern begins or ends, all rows are alike, so that checking one of them suffices.
    """
    period = max((pattern.strides[0][1] for pattern in patterns if pattern.strides), default=0)
    if not period:
        return _is_contiguous(sorted(patterns), size)
    if size % period:
        return False
    begins: defaultdict[int, list[_WritePattern]] = defaultdict(list)
    ends: defaultdict[int, list[_WritePattern]] = defaultdict(list)
    for pattern in patterns:
        for first, stop, rest in _fold_rows(pattern, period):
            begins[first].append(rest)
            ends[stop].append(rest)
    rows = sorted({0, size // period, *begins, *ends})
    if rows[0] != 0 or rows[-1] != size // period:
        return False
    active: list[_WritePattern] = []
    for row in rows[:-1]:
        for pattern in ends[row]:
            active.remove(pattern)
        active += begins[row]
        if not _tiles(active, period):
            return False
    return True


def _is_contiguous(patterns: Sequence[_WritePattern], size: int) -> bool:
    cursor = 0
    for pattern in patterns:
        if pattern.start != cursor:
            return False
        cursor += pattern.length
    return cursor == size


def _fold_rows(pattern: _WritePattern, period: int) -> Iterator[tuple[int, int, _WritePattern]]:
    """Yield (first row, row after the last, the pattern within each of these rows)."""
    row, start = divmod(pattern.start, period)
    if pattern.strides and pattern.strides[0][1] == period:
        yield row, row + pattern.strides[0][0], _WritePattern(start, pattern.strides[1:], pattern.length)
    elif pattern.stop <= (row + 1) * period:
        yield row, row + 1, pattern._replace(start=start)
    elif pattern.strides:
        (count, stride), inner = pattern.strides[0], pattern.strides[1:]
        for index in range(count):
            yield from _fold_rows(_WritePattern(pattern.start + index * stride, inner, pattern.length), period)
    elif start:
        head = period - start
        yield row, row + 1, _WritePattern(start, (), head)
        yield from _fold_rows(_WritePattern((row + 1) * period, (), pattern.length - head), period)
    else:
        full, rest = divmod(pattern.length, period)
        yield row, row + full, _WritePattern(0, (), period)
        if rest:
            yield row + full, row + full + 1, _WritePattern(0, (), rest)
