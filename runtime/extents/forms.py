"""Extents: where the elements of a tensor lie in other tensors, in integers alone.

A *form* says how one tensor is made of others: its boxes, each an affine view of a source. Every way from stored
tensors to a rank's local tensors (merging experts, concatenating gate and up, sharding) is an operation on forms,
so that chaining operations composes the maps and nothing is copied until bytes are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import prod

__all__ = [
    "Extent",
    "Form",
    "FormError",
    "chunk",
    "chunk_bounds",
    "concatenate",
    "narrow",
    "permute",
    "row_major",
    "split",
    "stack",
    "transpose",
    "unbind",
    "unravel",
    "whole",
]


class FormError(ValueError):
    """An operation is not defined for tensors of these shapes; callers know the names and say them.

    Every function below that takes a dim, a range, sizes or an order raises it where they are not the form's.
    """


@dataclass(frozen=True, slots=True)
class Extent:
    """One box of a tensor, or a regular grid in one, as an affine view of a source.

    Args:
        offset: where the box begins in the tensor, per tensor dim.
        shape: the elements it has per tensor dim, nowhere zero.
        steps: how far apart they are along each tensor dim; 1 where the box has no gaps.
        source: the name of the tensor that holds its elements.
        base: the element of the source, counted flat in row-major order, at the box's first corner.
        strides: source elements per step along each tensor dim.
    """

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    steps: tuple[int, ...]
    source: str
    base: int
    strides: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Form:
    """A tensor's shape and the extents that make it up; together they cover it exactly once."""

    shape: tuple[int, ...]
    extents: tuple[Extent, ...]

    @property
    def sources(self) -> tuple[str, ...]:
        """The names of the sources, each once, in order of first use."""
        return tuple(dict.fromkeys(extent.source for extent in self.extents))


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the strides, in elements, of a contiguous tensor of this shape."""
    strides = [1] * len(shape)
    for dim in range(len(shape) - 2, -1, -1):
        strides[dim] = strides[dim + 1] * shape[dim + 1]
    return tuple(strides)


def whole(source: str, shape: Sequence[int]) -> Form:
    """Return the form of a tensor that is the source itself."""
    shape = tuple(shape)
    origin = (0,) * len(shape)
    return Form(shape, (Extent(origin, shape, (1,) * len(shape), source, 0, row_major(shape)),) if prod(shape) else ())


def narrow(form: Form, dim: int, start: int, length: int) -> Form:
    """Return the slice `[start, start + length)` along `dim`."""
    dim = _dim(dim, len(form.shape))
    if not 0 <= start <= start + length <= form.shape[dim]:
        raise FormError(f"[{start}, {start + length}) is outside dim {dim} of {list(form.shape)}")
    if length == form.shape[dim]:
        return form
    extents = (_clipped(extent, dim, start, start + length) for extent in form.extents)
    return Form(_with(form.shape, dim, length), tuple(extent for extent in extents if extent))


def concatenate(forms: Sequence[Form], dim: int) -> Form:
    """Return the forms joined along `dim`, as `torch.cat` joins tensors of equal dims."""
    if not forms:
        raise FormError("there is nothing to concatenate")
    first = forms[0].shape
    dim = _dim(dim, len(first))
    for form in forms:
        if len(form.shape) != len(first) or _with(form.shape, dim, 0) != _with(first, dim, 0):
            raise FormError(f"{list(first)} and {list(form.shape)} do not join along dim {dim}")
    extents: list[Extent] = []
    length = 0
    for form in forms:
        extents += [_moved(extent, dim, length) for extent in form.extents]
        length += form.shape[dim]
    return Form(_with(first, dim, length), tuple(extents))


def stack(forms: Sequence[Form], dim: int) -> Form:
    """Return the forms joined along a new dim, as `torch.stack` joins tensors."""
    return concatenate([_unsqueezed(form, dim) for form in forms], dim)


def unbind(form: Form, dim: int) -> tuple[Form, ...]:
    """Return the slices along `dim`, each without that dim, as `torch.unbind`."""
    dim = _dim(dim, len(form.shape))
    slices = (narrow(form, dim, index, 1) for index in range(form.shape[dim]))
    return tuple(_squeezed(piece, dim) for piece in slices)


def split(form: Form, sizes: Iterable[int], dim: int) -> tuple[Form, ...]:
    """Return consecutive slices of the given sizes along `dim`, which they must fill."""
    pieces: list[Form] = []
    start = 0
    for size in sizes:
        pieces.append(narrow(form, dim, start, size))
        start += size
    if start != form.shape[_dim(dim, len(form.shape))]:
        raise FormError(f"sizes that sum to {start} do not split dim {dim} of {list(form.shape)}")
    return tuple(pieces)


def chunk(form: Form, count: int, dim: int) -> tuple[Form, ...]:
    """Return what `torch.chunk` returns: at most `count` slices of equal size, the last one shorter."""
    dim = _dim(dim, len(form.shape))
    bounds = (chunk_bounds(form.shape[dim], count, index) for index in range(count))
    filled = [length for _, length in bounds if length] or [0]
    return split(form, filled, dim)


def transpose(form: Form, dim0: int, dim1: int) -> Form:
    """Return the form with two dims swapped."""
    order = list(range(len(form.shape)))
    dim0, dim1 = _dim(dim0, len(order)), _dim(dim1, len(order))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return permute(form, order)


def permute(form: Form, order: Sequence[int]) -> Form:
    """Return the form with its dims in another order, as `torch.permute`."""
    if sorted(order) != list(range(len(form.shape))):
        raise FormError(f"{list(order)} is no order of {len(form.shape)} dims")

    def ordered(values: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(values[dim] for dim in order)

    return Form(ordered(form.shape), tuple(_every_dim(extent, ordered) for extent in form.extents))


def chunk_bounds(size: int, count: int, index: int) -> tuple[int, int]:
    """Return start and length of chunk `index` of `count`, as `torch.chunk` cuts: uneven or empty at the end."""
    step = -(-size // count)
    start = min(index * step, size)
    return start, min(step, size - start)


def unravel(index: int, shape: Sequence[int]) -> tuple[int, ...]:
    """Return the place, per dim, of an element of a contiguous tensor that is counted flat."""
    place: list[int] = []
    for stride in row_major(shape):
        place.append(index // stride)
        index %= stride
    return tuple(place)


def _clipped(extent: Extent, dim: int, start: int, stop: int) -> Extent | None:
    offset, step = extent.offset[dim], extent.steps[dim]
    first = max(0, -((offset - start) // step))
    last = min(extent.shape[dim], -((offset - stop) // step))
    if first >= last:
        return None
    return Extent(
        _with(extent.offset, dim, offset + first * step - start),
        _with(extent.shape, dim, last - first),
        extent.steps,
        extent.source,
        extent.base + first * extent.strides[dim],
        extent.strides,
    )


def _moved(extent: Extent, dim: int, distance: int) -> Extent:
    # Spelled out: `dataclasses.replace` takes several times as long, and a large model has a million extents.
    offset = _with(extent.offset, dim, extent.offset[dim] + distance)
    return Extent(offset, extent.shape, extent.steps, extent.source, extent.base, extent.strides)


def _unsqueezed(form: Form, dim: int) -> Form:
    dim = _dim(dim, len(form.shape) + 1)

    def wider(values: tuple[int, ...], value: int) -> tuple[int, ...]:
        return (*values[:dim], value, *values[dim:])

    extents = (
        Extent(wider(e.offset, 0), wider(e.shape, 1), wider(e.steps, 1), e.source, e.base, wider(e.strides, 0))
        for e in form.extents
    )
    return Form(wider(form.shape, 1), tuple(extents))


def _squeezed(form: Form, dim: int) -> Form:
    def slimmer(values: tuple[int, ...]) -> tuple[int, ...]:
        return values[:dim] + values[dim + 1 :]

    return Form(slimmer(form.shape), tuple(_every_dim(extent, slimmer) for extent in form.extents))


def _every_dim(extent: Extent, change: Callable[[tuple[int, ...]], tuple[int, ...]]) -> Extent:
    return Extent(
        change(extent.offset),
        change(extent.shape),
        change(extent.steps),
        extent.source,
        extent.base,
        change(extent.strides),
    )


def _with(values: tuple[int, ...], dim: int, value: int) -> tuple[int, ...]:
    return (*values[:dim], value, *values[dim + 1 :])


def _dim(dim: int, ndim: int) -> int:
    if not -ndim <= dim < ndim:
        raise FormError(f"there is no dim {dim} among {ndim}")
    return dim % ndim
