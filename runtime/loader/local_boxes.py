"""Where a rank's part of a tensor lies in the whole tensor, so that the bytes it reads can be summed at their places.

Copies are planned with offsets in the bytes of the whole tensor, which digests count from, and are converted to offsets
in the rank's local tensor where they are carried out. Within one box, bytes that are contiguous in the whole tensor are
contiguous in the local one too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from runtime.tensor_map.strided_copy import Stride, StridedCopy, plan_copies
from runtime.tensor_map.tensor_map import Shape, StridedBox, TensorMap, narrow, row_major, unravel

__all__ = ["LocalBox", "plan_box_copies"]


@dataclass(frozen=True)
class LocalBox:
    """A box of a rank's local tensor, as a function from offsets in the whole tensor to offsets in the local one.

    Args:
        levels: for each level that rows are nested by, the bits from one row to the next, whole and local; outermost
            first. Empty if both offsets are always the same.
        shift: the bits to add to what the levels sum up to.
    """

    levels: tuple[tuple[int, int], ...] = ()
    shift: int = 0

    def to_local(self, copy: StridedCopy) -> StridedCopy:
        """Return a copy to the whole tensor as the copy to the local one."""
        if not self.levels:
            return copy
        start = self._find_local(copy.destination_offset)
        length, strides = copy.length, list[Stride]()
        for steps, source, destination in reversed(copy.strides):
            stride = Stride(steps, source, self._find_local(copy.destination_offset + destination) - start)
            if not strides and stride[1:] == (length, length):
                length *= steps
            elif strides and stride[1:] == strides[-1].outer_strides:
                strides[-1] = strides[-1]._replace(steps=strides[-1].steps * steps)
            else:
                strides.append(stride)
        return StridedCopy(copy.source, copy.source_offset, copy.destination, start, length, tuple(reversed(strides)))

    def locate(self, copy: StridedCopy) -> tuple[int, tuple[int, ...]]:
        """Return where a copy to the whole tensor begins in the local one, and the local bytes between its steps."""
        if not self.levels:
            return copy.destination_offset, tuple(stride.destination_stride for stride in copy.strides)
        start = self._find_local(copy.destination_offset)
        strides = (self._find_local(copy.destination_offset + s.destination_stride) - start for s in copy.strides)
        return start, tuple(strides)

    def _find_local(self, offset: int) -> int:
        rest, found = offset * 8, self.shift
        for whole_stride, local_stride in self.levels:
            index, rest = divmod(rest, whole_stride)
            found += index * local_stride
        return (found + rest) // 8


def plan_box_copies(
    tensor_map: TensorMap, local_map: TensorMap, shape: Shape, bits: int, numbers: Mapping[str, int], first: int
) -> Iterator[tuple[LocalBox, list[StridedCopy]]]:
    """Yield the boxes of a rank's local tensor, each with the copies that fill it, in offsets of the whole tensor.

    Args:
        tensor_map: the local tensor over the stored chunks.
        local_map: the local tensor over the whole one.
        shape: the shape of the whole tensor.
        bits: the bits of an element.
        numbers: the number of each stored chunk by name.
        first: the destination number of the first box; the others follow.

    Raises:
        TensorMapError: an element smaller than a byte would be cut.
    """
    for number, box in enumerate(local_map.boxes, first):
        part = tensor_map
        for dim, (start, length) in enumerate(zip(box.offset, box.shape, strict=True)):
            part = narrow(part, dim, start, length)
        place = unravel(box.base, shape)
        boxes = part.boxes
        if any(place):
            boxes = tuple(_move(one, place) for one in boxes)
        copies = plan_copies(TensorMap(shape, boxes), bits, numbers, number)
        yield _build_local_box(box, place, local_map.shape, shape, bits), list(copies)


def _move(box: StridedBox, by: Sequence[int]) -> StridedBox:
    offset = tuple(start + distance for start, distance in zip(box.offset, by, strict=True))
    return StridedBox(offset, box.shape, box.steps, box.source, box.base, box.strides)


def _build_local_box(box: StridedBox, place: Sequence[int], local: Shape, shape: Shape, bits: int) -> LocalBox:
    if local == shape:
        return LocalBox()
    strides = list(zip(row_major(shape), row_major(local), strict=True))
    shift = sum(own * inner - begin * inner for own, begin, (_, inner) in zip(box.offset, place, strides, strict=True))
    # Rows that follow one another in both tensors need no level of their own.
    levels = [
        (outward * bits, inward * bits)
        for dim, (outward, inward) in enumerate(strides)
        if dim + 1 == len(shape) or local[dim + 1] != shape[dim + 1]
    ]
    return LocalBox(tuple(levels), shift * bits)
