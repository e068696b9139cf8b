"""Reshape, invert and compose tensor maps.

A box is a nest of loops, each with a number of steps and their flat distances in the tensor and in its source. Over a
tensor of a given shape, the loops become boxes again: reshaping places them over another shape of the same tensor,
inverting over the shape of the source.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from math import gcd, prod
from typing import NamedTuple

from runtime.tensor_map.tensor_map import StridedBox, TensorMap, TensorMapError, row_major, unravel

__all__ = ["compose", "invert", "reshape"]


class _Loop(NamedTuple):
    """A loop of `steps`, with their distances in elements in the tensor that is described and in the other one."""

    steps: int
    outer_stride: int
    inner_stride: int


def reshape(tensor_map: TensorMap, shape: Sequence[int]) -> TensorMap:
    """Return the tensor map with its elements in the same flat order under another shape, as `torch.reshape`.

    Raises:
        TensorMapError: the shape has another number of elements.
    """
    shape = tuple(shape)
    if prod(shape) != prod(tensor_map.shape):
        raise TensorMapError(f"{list(tensor_map.shape)} has no view of shape {list(shape)}")
    strides = row_major(tensor_map.shape)
    boxes = (
        reshaped
        for box in tensor_map.boxes
        for reshaped in _build_boxes(
            _build_loops(box, strides), _compute_flat_offset(box, strides), box.base, shape, box.source
        )
    )
    return TensorMap(shape, tuple(boxes))


def invert(tensor_maps: Mapping[str, TensorMap], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, TensorMap]:
    """Return the tensor maps of the sources over the tensors that are made of them.

    Args:
        tensor_maps: the tensor maps by name; together they use every element of the sources once.
        shapes: the shapes of the sources by name.
    """
    boxes: defaultdict[str, list[StridedBox]] = defaultdict(list)
    for name, tensor_map in tensor_maps.items():
        strides = row_major(tensor_map.shape)
        for box in tensor_map.boxes:
            boxes[box.source] += _invert_box(box, strides, shapes[box.source], name)
    return {source: TensorMap(shape, tuple(boxes[source])) for source, shape in shapes.items()}


def compose(sources: Mapping[str, TensorMap]) -> Callable[[TensorMap], TensorMap]:
    """Return a function that replaces the sources of a tensor map by what they are made of themselves.

    Args:
        sources: the tensor maps of the sources by name.
    """
    sorted_boxes = {name: cache(partial(_sort_by_first_dim, source)) for name, source in sources.items()}

    def compose_map(tensor_map: TensorMap) -> TensorMap:
        strides = row_major(tensor_map.shape)
        boxes = (
            composed
            for box in tensor_map.boxes
            for grid in _invert_box(box, strides, sources[box.source].shape)
            for part in sorted_boxes[box.source]().find_overlapping(grid)
            for composed in _intersect(grid, part, tensor_map.shape)
        )
        return TensorMap(tensor_map.shape, tuple(boxes))

    return compose_map


@dataclass(frozen=True)
class _SortedBoxes:
    """The boxes of a source, sorted by where they begin along its first dim.

    Args:
        boxes: the boxes of the source.
        starts: where each box begins along the first dim.
        widest: the largest width of a box along that dim.
    """

    boxes: Sequence[StridedBox]
    starts: Sequence[int]
    widest: int

    def find_overlapping(self, grid: StridedBox) -> Sequence[StridedBox]:
        """Return the boxes that may share elements with a grid."""
        if not grid.shape:
            return self.boxes
        begin = bisect_right(self.starts, grid.offset[0] - self.widest)
        end = bisect_left(self.starts, grid.offset[0] + (grid.shape[0] - 1) * grid.steps[0] + 1)
        return self.boxes[begin:end]


def _sort_by_first_dim(source: TensorMap) -> _SortedBoxes:
    if not source.shape:
        return _SortedBoxes(source.boxes, (), 0)
    boxes = sorted(source.boxes, key=lambda box: box.offset[0])
    widest = max(((box.shape[0] - 1) * box.steps[0] + 1 for box in boxes), default=0)
    return _SortedBoxes(boxes, [box.offset[0] for box in boxes], widest)


def _invert_box(box: StridedBox, strides: Sequence[int], shape: Sequence[int], name: str = "") -> Iterator[StridedBox]:
    """Yield the grids of a box's source that it uses, as boxes over the tensor of that name."""
    loops = [_Loop(loop.steps, loop.inner_stride, loop.outer_stride) for loop in _build_loops(box, strides)]
    yield from _build_boxes(loops, box.base, _compute_flat_offset(box, strides), shape, name)


def _intersect(grid: StridedBox, part: StridedBox, shape: Sequence[int]) -> Iterator[StridedBox]:
    """Yield the boxes of a tensor of this shape whose elements lie both in a grid and in one part of its source."""
    outer, inner, loops = grid.base, part.base, list[_Loop]()
    for dim, size in enumerate(grid.shape):
        one = range(grid.offset[dim], grid.offset[dim] + size * grid.steps[dim], grid.steps[dim])
        other = range(part.offset[dim], part.offset[dim] + part.shape[dim] * part.steps[dim], part.steps[dim])
        common = _intersect_ranges(one, other)
        if not common:
            return
        outer += one.index(common[0]) * grid.strides[dim]
        inner += other.index(common[0]) * part.strides[dim]
        outward, inward = common.step // one.step * grid.strides[dim], common.step // other.step * part.strides[dim]
        loops.append(_Loop(len(common), outward, inward))
    yield from _build_boxes(loops, outer, inner, shape, part.source)


def _intersect_ranges(left: range, right: range) -> range:
    """Return the numbers that two ranges share."""
    shared = gcd(left.step, right.step)
    distance = right.start - left.start
    if distance % shared:
        return range(0)
    step = left.step * right.step // shared
    turns = distance // shared * pow(left.step // shared, -1, right.step // shared) if right.step > shared else 0
    first = left.start + turns % (right.step // shared) * left.step
    first += max(0, -((first - max(left.start, right.start)) // step)) * step
    return range(first, min(left.stop, right.stop), step)


def _build_loops(box: StridedBox, strides: Sequence[int]) -> list[_Loop]:
    """Return a box's loops, where a loop that merely continues a wider one is joined to it."""
    loops: list[_Loop] = []
    dims = zip(box.shape, box.steps, strides, box.strides, strict=True)
    for count, step, stride, inward in dims:
        loop = _Loop(count, step * stride, inward)
        if count > 1 and loops and loops[-1][1:] == (count * loop.outer_stride, count * inward):
            loops[-1] = loop._replace(steps=loops[-1].steps * count)
        elif count > 1:
            loops.append(loop)
    return loops


def _compute_flat_offset(box: StridedBox, strides: Sequence[int]) -> int:
    return sum(index * stride for index, stride in zip(box.offset, strides, strict=True))


def _build_boxes(
    loops: Sequence[_Loop], outer: int, inner: int, shape: Sequence[int], source: str
) -> Iterator[StridedBox]:
    """Yield the boxes of a tensor that a nest of loops visits.

    Args:
        loops: the loops, in any order.
        outer: the flat index in the tensor where they begin.
        inner: the flat index in the other tensor where they begin.
        shape: the shape of the tensor.
        source: the name of the other tensor.
    """
    strides = row_major(shape)
    offset = unravel(outer, shape)
    placed: dict[int, _Loop] = {}
    rest = [loop for loop in loops if loop.steps > 1]
    while rest:
        loop = rest.pop()
        dim = _find_dim(loop, shape, strides)
        step = loop.outer_stride // strides[dim]
        stays = offset[dim] + (loop.steps - 1) * step < shape[dim] and loop.outer_stride % strides[dim] == 0
        if stays and dim not in placed:
            placed[dim] = loop
            continue
        others = [*rest, *placed.values()]
        if stays and placed[dim].steps < loop.steps:
            others = [*(other for other in others if other is not placed[dim]), loop]
            loop = placed[dim]
        for part, skipped in _split_loop(loop, offset[dim], shape[dim], strides[dim]):
            begin = outer + skipped * loop.outer_stride, inner + skipped * loop.inner_stride
            yield from _build_boxes([*others, *part], *begin, shape, source)
        return
    sizes = tuple(placed[dim].steps if dim in placed else 1 for dim in range(len(shape)))
    steps = tuple(placed[dim].outer_stride // strides[dim] if dim in placed else 1 for dim in range(len(shape)))
    inward = tuple(placed[dim].inner_stride if dim in placed else 0 for dim in range(len(shape)))
    yield StridedBox(offset, sizes, steps, source, inner, inward)


def _find_dim(loop: _Loop, shape: Sequence[int], strides: Sequence[int]) -> int:
    """Return the dim along which a loop steps: the widest whose stride is no wider than a step."""
    return next(dim for dim, stride in enumerate(strides) if shape[dim] > 1 and stride <= loop.outer_stride)


def _split_loop(loop: _Loop, offset: int, size: int, stride: int) -> Iterator[tuple[list[_Loop], int]]:
    """Yield parts of a loop that stay within a dim, each with the number of steps before it.

    A loop that continues in the next row is split into the rest of its first row, whole rows and the beginning of its
    last row; one that does not meet the same indices in every row is split into its steps.
    """
    step, odd = divmod(loop.outer_stride, stride)
    if odd or size % step or offset + (loop.steps - 1) * step < size:
        yield from (([], index) for index in range(loop.steps))
        return
    row = size // step
    head = min(-(offset // step) % row, loop.steps)
    rows, tail = divmod(loop.steps - head, row)
    if head:
        yield [loop._replace(steps=head)], 0
    if rows:
        yield [loop._replace(steps=row), _Loop(rows, row * loop.outer_stride, row * loop.inner_stride)], head
    if tail:
        yield [loop._replace(steps=tail)], head + rows * row
