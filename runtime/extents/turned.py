"""Forms seen from elsewhere: reshaped, turned round to say what their sources are made of, and one through another.

An extent is a nest of loops: so many steps, each so far apart in the tensor and in its source, both counted flat. Laid
over a tensor of some shape, the loops become boxes of that shape again. Reshaping lays them over another shape of the
same tensor, turning round over the shape of the source.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from math import gcd, prod
from typing import NamedTuple

from runtime.extents.forms import Extent, Form, FormError, row_major, unravel

__all__ = ["inverse", "reshape", "through"]


class _Loop(NamedTuple):
    """So many steps, each so many elements apart in the tensor that is laid out and in the other one."""

    steps: int
    outward: int
    inward: int


def reshape(form: Form, shape: Sequence[int]) -> Form:
    """Return the form with its elements in the same flat order under another shape, as `torch.reshape`.

    Raises:
        FormError: the shape has another number of elements.
    """
    shape = tuple(shape)
    if prod(shape) != prod(form.shape):
        raise FormError(f"{list(form.shape)} has no view of shape {list(shape)}")
    strides = row_major(form.shape)
    boxes = (
        box
        for extent in form.extents
        for box in _laid(_loops(extent, strides), _flat(extent, strides), extent.base, shape, extent.source)
    )
    return Form(shape, tuple(boxes))


def inverse(forms: Mapping[str, Form], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Form]:
    """Return the forms of the sources over the tensors that are made of them.

    Args:
        forms: of tensors by name; together they use every element of the sources once.
        shapes: of the sources by name.
    """
    found: defaultdict[str, list[Extent]] = defaultdict(list)
    for name, form in forms.items():
        strides = row_major(form.shape)
        for extent in form.extents:
            loops = [_Loop(loop.steps, loop.inward, loop.outward) for loop in _loops(extent, strides)]
            base = _flat(extent, strides)
            found[extent.source] += _laid(loops, extent.base, base, shapes[extent.source], name)
    return {source: Form(shape, tuple(found[source])) for source, shape in shapes.items()}


def through(sources: Mapping[str, Form]) -> Callable[[Form], Form]:
    """Return a function from a form over sources to the form over what the sources are made of themselves.

    Args:
        sources: their own forms by name.
    """
    near = {name: cache(partial(_by_first_dim, form)) for name, form in sources.items()}

    def seen(form: Form) -> Form:
        strides = row_major(form.shape)
        boxes = (
            box
            for extent in form.extents
            for grid in _over_source(extent, strides, sources[extent.source].shape)
            for part in near[extent.source]().meeting(grid)
            for box in _met(grid, part, form.shape)
        )
        return Form(form.shape, tuple(boxes))

    return seen


@dataclass(frozen=True)
class _Parts:
    """The extents of a source, sorted by where they begin along its first dim.

    Args:
        extents: of the source.
        starts: of each along the first dim.
        widest: how far one reaches along it at most.
    """

    extents: Sequence[Extent]
    starts: Sequence[int]
    widest: int

    def meeting(self, grid: Extent) -> Sequence[Extent]:
        """Return those that may share elements with a grid."""
        if not grid.shape:
            return self.extents
        begin = bisect_right(self.starts, grid.offset[0] - self.widest)
        end = bisect_left(self.starts, grid.offset[0] + (grid.shape[0] - 1) * grid.steps[0] + 1)
        return self.extents[begin:end]


def _by_first_dim(source: Form) -> _Parts:
    if not source.shape:
        return _Parts(source.extents, (), 0)
    extents = sorted(source.extents, key=lambda part: part.offset[0])
    widest = max(((part.shape[0] - 1) * part.steps[0] + 1 for part in extents), default=0)
    return _Parts(extents, [part.offset[0] for part in extents], widest)


def _over_source(extent: Extent, strides: Sequence[int], shape: Sequence[int]) -> Iterator[Extent]:
    """Yield the grids of an extent's source that it uses, each over the tensor that uses them."""
    loops = [_Loop(loop.steps, loop.inward, loop.outward) for loop in _loops(extent, strides)]
    yield from _laid(loops, extent.base, _flat(extent, strides), shape, "")


def _met(grid: Extent, part: Extent, shape: Sequence[int]) -> Iterator[Extent]:
    """Yield the boxes of a tensor of this shape that come through a grid of its source from one part of that source."""
    outer, inner, loops = grid.base, part.base, list[_Loop]()
    for dim, size in enumerate(grid.shape):
        one = range(grid.offset[dim], grid.offset[dim] + size * grid.steps[dim], grid.steps[dim])
        other = range(part.offset[dim], part.offset[dim] + part.shape[dim] * part.steps[dim], part.steps[dim])
        common = _common(one, other)
        if not common:
            return
        outer += one.index(common[0]) * grid.strides[dim]
        inner += other.index(common[0]) * part.strides[dim]
        outward, inward = common.step // one.step * grid.strides[dim], common.step // other.step * part.strides[dim]
        loops.append(_Loop(len(common), outward, inward))
    yield from _laid(loops, outer, inner, shape, part.source)


def _common(one: range, other: range) -> range:
    """Return the numbers that two ranges share."""
    shared = gcd(one.step, other.step)
    distance = other.start - one.start
    if distance % shared:
        return range(0)
    step = one.step * other.step // shared
    turns = distance // shared * pow(one.step // shared, -1, other.step // shared) if other.step > shared else 0
    first = one.start + turns % (other.step // shared) * one.step
    first += max(0, -((first - max(one.start, other.start)) // step)) * step
    return range(first, min(one.stop, other.stop), step)


def _loops(extent: Extent, strides: Sequence[int]) -> list[_Loop]:
    """Return an extent's loops, those that only go on in a wider one joined to it."""
    loops: list[_Loop] = []
    dims = zip(extent.shape, extent.steps, strides, extent.strides, strict=True)
    for count, step, stride, inward in dims:
        loop = _Loop(count, step * stride, inward)
        if count > 1 and loops and loops[-1][1:] == (count * loop.outward, count * inward):
            loops[-1] = loop._replace(steps=loops[-1].steps * count)
        elif count > 1:
            loops.append(loop)
    return loops


def _flat(extent: Extent, strides: Sequence[int]) -> int:
    return sum(place * stride for place, stride in zip(extent.offset, strides, strict=True))


def _laid(loops: Sequence[_Loop], outer: int, inner: int, shape: Sequence[int], source: str) -> Iterator[Extent]:
    """Yield the boxes of a tensor that a nest of loops visits.

    Args:
        loops: in any order.
        outer: the flat place in the tensor where they begin.
        inner: the flat place in the other one.
        shape: of the tensor.
        source: the name of the other one.
    """
    strides = row_major(shape)
    offset = unravel(outer, shape)
    placed: dict[int, _Loop] = {}
    rest = [loop for loop in loops if loop.steps > 1]
    while rest:
        loop = rest.pop()
        dim = _dim_of(loop, shape, strides)
        step = loop.outward // strides[dim]
        stays = offset[dim] + (loop.steps - 1) * step < shape[dim] and loop.outward % strides[dim] == 0
        if stays and dim not in placed:
            placed[dim] = loop
            continue
        others = [*rest, *placed.values()]
        if stays and placed[dim].steps < loop.steps:
            others = [*(one for one in others if one is not placed[dim]), loop]
            loop = placed[dim]
        for part, skipped in _parts(loop, offset[dim], shape[dim], strides[dim]):
            begin = outer + skipped * loop.outward, inner + skipped * loop.inward
            yield from _laid([*others, *part], *begin, shape, source)
        return
    sizes = tuple(placed[dim].steps if dim in placed else 1 for dim in range(len(shape)))
    steps = tuple(placed[dim].outward // strides[dim] if dim in placed else 1 for dim in range(len(shape)))
    inward = tuple(placed[dim].inward if dim in placed else 0 for dim in range(len(shape)))
    yield Extent(offset, sizes, steps, source, inner, inward)


def _dim_of(loop: _Loop, shape: Sequence[int], strides: Sequence[int]) -> int:
    """Return the dim that a loop's steps go along: the widest whose stride is no wider than one."""
    return next(dim for dim, stride in enumerate(strides) if shape[dim] > 1 and stride <= loop.outward)


def _parts(loop: _Loop, place: int, size: int, stride: int) -> Iterator[tuple[list[_Loop], int]]:
    """Yield loops that together are one, each with the steps before it, that do not run over the end of a dim.

    A loop that begins at a place of a dim and goes on in the next row becomes the rest of its first row, whole rows
    and the beginning of the last one; one that does not meet the same places in every row comes step by step.
    """
    step, odd = divmod(loop.outward, stride)
    if odd or size % step or place + (loop.steps - 1) * step < size:
        yield from (([], index) for index in range(loop.steps))
        return
    row = size // step
    head = min(-(place // step) % row, loop.steps)
    rows, tail = divmod(loop.steps - head, row)
    if head:
        yield [loop._replace(steps=head)], 0
    if rows:
        yield [loop._replace(steps=row), _Loop(rows, row * loop.outward, row * loop.inward)], head
    if tail:
        yield [loop._replace(steps=tail)], head + rows * row
