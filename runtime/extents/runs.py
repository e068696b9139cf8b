"""Runs: the byte table that a reshard is, and the proof that it writes every byte exactly once.

A run moves one strided block of bytes from a source region to a destination region. Regions are byte ranges such as
a stored tensor in a file, a local tensor in a rank's file, or a parameter's logical bytes that a digest reads.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from runtime.extents.forms import Extent, Form, FormError, row_major

__all__ = ["Repeat", "Run", "covers", "cut", "flipped", "runs_of"]


class Repeat(NamedTuple):
    """A block that comes `steps` times, so many bytes apart in the source and in the destination."""

    steps: int
    source_stride: int
    destination_stride: int

    @property
    def extent(self) -> tuple[int, int]:
        """The strides that a further repeat around this one would have if it only went on."""
        return self.steps * self.source_stride, self.steps * self.destination_stride


class Run(NamedTuple):
    """`length` contiguous bytes, repeated; offsets in bytes from the beginning of the two regions.

    `repeats` are nested, outermost first, with destination strides that never grow inwards.
    """

    source: int
    source_offset: int
    destination: int
    destination_offset: int
    length: int
    repeats: tuple[Repeat, ...] = ()

    @property
    def size(self) -> int:
        """The bytes that the run moves."""
        size = self.length
        for repeat in self.repeats:
            size *= repeat.steps
        return size

    @property
    def source_stop(self) -> int:
        """The end of the source bytes that the run spans."""
        return self.source_offset + self.length + sum((r.steps - 1) * r.source_stride for r in self.repeats)


class _Pattern(NamedTuple):
    """The destination side of a run: `length` bytes at `start`, repeated by (count, stride), outermost first."""

    start: int
    repeats: tuple[tuple[int, int], ...]
    length: int

    @property
    def stop(self) -> int:
        return self.start + self.length + sum((count - 1) * stride for count, stride in self.repeats)


def runs_of(form: Form, bits: int, sources: Mapping[str, int], destination: int) -> Iterator[Run]:
    """Yield the runs that build a tensor, one for each extent.

    Args:
        form: of the tensor.
        bits: of one element; elements smaller than a byte may not be cut within one.
        sources: the region of each source by name.
        destination: the region the tensor is written to, row-major from its first byte.

    Raises:
        FormError: an extent begins or ends inside a byte.
    """
    strides = row_major(form.shape)
    for extent in form.extents:
        yield _run(extent, strides, bits, sources[extent.source], destination)


def _run(extent: Extent, strides: Sequence[int], bits: int, source: int, destination: int) -> Run:
    length, repeats = bits, list[Repeat]()
    dims = zip(extent.shape, extent.strides, extent.steps, strides, strict=True)
    for count, inward, step, outward in reversed(list(dims)):
        inward, outward = inward * bits, outward * step * bits
        if count == 1:
            continue
        if not repeats and inward == outward == length:
            length *= count
        elif repeats and (inward, outward) == repeats[-1].extent:
            repeats[-1] = repeats[-1]._replace(steps=repeats[-1].steps * count)
        else:
            repeats.append(Repeat(count, inward, outward))
    start = sum(index * stride for index, stride in zip(extent.offset, strides, strict=True)) * bits
    numbers = (
        extent.base * bits,
        start,
        length,
        *(number for r in repeats for number in (r.source_stride, r.destination_stride)),
    )
    if any(number % 8 for number in numbers):
        raise FormError(f"elements of {bits} bits are cut within a byte")
    repeated = tuple(Repeat(r.steps, r.source_stride // 8, r.destination_stride // 8) for r in reversed(repeats))
    return Run(source, extent.base * bits // 8, destination, start // 8, length // 8, repeated)


def cut(run: Run, block: int) -> Iterator[tuple[int, Run]]:
    """Yield the run in parts that each read from one block of the source, with that block's number.

    Args:
        run: the run to cut.
        block: bytes; block n is `[n * block, (n + 1) * block)` of the source region.
    """
    if run.repeats and run.source_stop > (run.source_offset // block + 1) * block:
        yield from _cut_repeats(run, block)
        return
    while run.source_stop > (boundary := (run.source_offset // block + 1) * block):
        head = boundary - run.source_offset
        yield run.source_offset // block, run._replace(length=head)
        rest = run.destination_offset + head
        run = run._replace(source_offset=boundary, destination_offset=rest, length=run.length - head)
    yield run.source_offset // block, run


def _cut_repeats(run: Run, block: int) -> Iterator[tuple[int, Run]]:
    """Cut between the steps of the widest source stride; a step that itself crosses a boundary is cut further."""
    widest = max(range(len(run.repeats)), key=lambda index: run.repeats[index].source_stride)
    count, inward, outward = run.repeats[widest]
    others = run.repeats[:widest] + run.repeats[widest + 1 :]
    span = run.source_stop - run.source_offset - (count - 1) * inward
    done = 0
    while done < count:
        start = run.source_offset + done * inward
        number = start // block
        fitting = ((number + 1) * block - start - span) // inward + 1
        steps = max(1, min(fitting, count - done))
        repeats = (*run.repeats[:widest], Repeat(steps, inward, outward), *run.repeats[widest + 1 :])
        part = run._replace(
            source_offset=start,
            destination_offset=run.destination_offset + done * outward,
            repeats=repeats if steps > 1 else others,
        )
        if fitting > 0:
            yield number, part
        else:
            yield from cut(part, block)
        done += steps


def flipped(run: Run) -> Run:
    """Return the run that moves the same bytes back."""
    repeats = tuple(Repeat(r.steps, r.destination_stride, r.source_stride) for r in run.repeats)
    return Run(run.destination, run.destination_offset, run.source, run.source_offset, run.length, repeats)


def covers(runs: Iterable[Run], sizes: Mapping[int, int]) -> bool:
    """Return whether the runs write every byte of every destination region exactly once.

    Args:
        runs: the whole table.
        sizes: bytes of each destination region.
    """
    patterns: defaultdict[int, list[_Pattern]] = defaultdict(list)
    for run in runs:
        patterns[run.destination].append(_destination(run))
    return patterns.keys() <= sizes.keys() and all(_tiles(patterns[d], size) for d, size in sizes.items())


def _destination(run: Run) -> _Pattern:
    length, repeats = run.length, list[tuple[int, int]]()
    for count, _, stride in reversed(run.repeats):
        if not repeats and stride == length:
            length *= count
        elif repeats and stride == repeats[-1][0] * repeats[-1][1]:
            repeats[-1] = (repeats[-1][0] * count, repeats[-1][1])
        else:
            repeats.append((count, stride))
    return _Pattern(run.destination_offset, tuple(reversed(repeats)), length)


def _tiles(patterns: Sequence[_Pattern], size: int) -> bool:
    """Return whether the patterns cover `[0, size)` exactly once.

    Dense patterns must follow one another. Otherwise the widest stride folds the range into rows: between two
    places where a pattern begins or ends, all rows look alike, so one of them is looked at.
    """
    period = max((pattern.repeats[0][1] for pattern in patterns if pattern.repeats), default=0)
    if not period:
        return _follow(sorted(patterns), size)
    if size % period:
        return False
    begins: defaultdict[int, list[_Pattern]] = defaultdict(list)
    ends: defaultdict[int, list[_Pattern]] = defaultdict(list)
    for pattern in patterns:
        for first, stop, rest in _folded(pattern, period):
            begins[first].append(rest)
            ends[stop].append(rest)
    rows = sorted({0, size // period, *begins, *ends})
    if rows[0] != 0 or rows[-1] != size // period:
        return False
    active: list[_Pattern] = []
    for row in rows[:-1]:
        for pattern in ends[row]:
            active.remove(pattern)
        active += begins[row]
        if not _tiles(active, period):
            return False
    return True


def _follow(patterns: Sequence[_Pattern], size: int) -> bool:
    cursor = 0
    for pattern in patterns:
        if pattern.start != cursor:
            return False
        cursor += pattern.length
    return cursor == size


def _folded(pattern: _Pattern, period: int) -> Iterator[tuple[int, int, _Pattern]]:
    """Yield (first row, row after the last, what the pattern is within each of these rows)."""
    row, start = divmod(pattern.start, period)
    if pattern.repeats and pattern.repeats[0][1] == period:
        yield row, row + pattern.repeats[0][0], _Pattern(start, pattern.repeats[1:], pattern.length)
    elif pattern.stop <= (row + 1) * period:
        yield row, row + 1, pattern._replace(start=start)
    elif pattern.repeats:
        (count, stride), inner = pattern.repeats[0], pattern.repeats[1:]
        for index in range(count):
            yield from _folded(_Pattern(pattern.start + index * stride, inner, pattern.length), period)
    elif start:
        head = period - start
        yield row, row + 1, _Pattern(start, (), head)
        yield from _folded(_Pattern((row + 1) * period, (), pattern.length - head), period)
    else:
        full, rest = divmod(pattern.length, period)
        yield row, row + full, _Pattern(0, (), period)
        if rest:
            yield row + full, row + full + 1, _Pattern(0, (), rest)
