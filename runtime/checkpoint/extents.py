"""Extents: where the elements of a tensor lie in other tensors, in integers alone.

A *form* says how one tensor is made of others: its boxes, each an affine view of a source. Every way from stored
tensors to a rank's local tensors (merging experts, concatenating gate and up, sharding) is an operation on forms,
so that chaining operations composes the maps and nothing is copied until bytes are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import prod

from plans.placement import Packed, Placement, Replicate, Shard

__all__ = [
    "Extent",
    "Form",
    "FormError",
    "chunk",
    "chunk_bounds",
    "concatenate",
    "local_form",
    "narrow",
    "reassemble",
    "row_major",
    "split",
    "stack",
    "transpose",
    "unbind",
    "whole",
]


class FormError(ValueError):
    """An operation is not defined for tensors of these shapes; callers know the names and say them."""


@dataclass(frozen=True, slots=True)
class Extent:
    """One box of a tensor as an affine view of a source.

    Args:
        offset: where the box begins in the tensor, per tensor dim.
        shape: its size per tensor dim, nowhere zero.
        source: the name of the tensor that holds its elements.
        base: the element of the source, counted flat in row-major order, at the box's first corner.
        strides: source elements per step along each tensor dim.
    """

    offset: tuple[int, ...]
    shape: tuple[int, ...]
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
    return Form(shape, (Extent(origin, shape, source, 0, row_major(shape)),) if prod(shape) else ())


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

    def swapped(values: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(values[dim] for dim in order)

    extents = (
        replace(e, offset=swapped(e.offset), shape=swapped(e.shape), strides=swapped(e.strides)) for e in form.extents
    )
    return Form(swapped(form.shape), tuple(extents))


def chunk_bounds(size: int, count: int, index: int) -> tuple[int, int]:
    """Return start and length of chunk `index` of `count`, as `torch.chunk` cuts: uneven or empty at the end."""
    step = -(-size // count)
    start = min(index * step, size)
    return start, min(step, size - start)


def local_form(form: Form, placements: Sequence[Placement], sizes: Sequence[int], coordinates: Sequence[int]) -> Form:
    """Return the form of the local tensor that a rank holds.

    Args:
        form: of the whole tensor.
        placements: one per mesh axis, outermost first. The innermost is applied first: FSDP, the outer one, cuts what
            tensor and expert parallelism leave.
        sizes: of the mesh axes.
        coordinates: the rank's index on each mesh axis.
    """
    for placement, size, coordinate in reversed(list(zip(placements, sizes, coordinates, strict=True))):
        form = _placed(form, placement, size, coordinate)
    return form


def reassemble(shape: Sequence[int], locals_: Iterable[tuple[str, Form]]) -> Form:
    """Return the form of a whole tensor over the local tensors that ranks hold.

    Args:
        shape: of the whole tensor.
        locals_: each local tensor's name and its form over the whole tensor; together they cover it once.
    """
    strides = row_major(shape)
    extents: list[Extent] = []
    for name, form in locals_:
        own = row_major(form.shape)
        for extent in form.extents:
            assert all(a == b or n == 1 for a, b, n in zip(extent.strides, strides, extent.shape, strict=True))
            base = sum(index * stride for index, stride in zip(extent.offset, own, strict=True))
            extents.append(Extent(_unravel(extent.base, shape), extent.shape, name, base, own))
    return Form(tuple(shape), tuple(extents))


def _placed(form: Form, placement: Placement, size: int, coordinate: int) -> Form:
    match placement:
        case Replicate():
            return form
        case Shard(dim):
            return narrow(form, dim, *chunk_bounds(form.shape[dim], size, coordinate))
        case Packed(dim, groups):
            if form.shape[dim] % (groups * size):
                raise FormError(f"{groups} groups of dim {dim} of {list(form.shape)} do not divide by {size}")
            if size == 1:
                return form
            parts = chunk(form, groups, dim)
            return concatenate(
                [narrow(part, dim, *chunk_bounds(part.shape[dim], size, coordinate)) for part in parts], dim
            )


def _clipped(extent: Extent, dim: int, start: int, stop: int) -> Extent | None:
    first = max(start, extent.offset[dim])
    last = min(stop, extent.offset[dim] + extent.shape[dim])
    if first >= last:
        return None
    return Extent(
        _with(extent.offset, dim, first - start),
        _with(extent.shape, dim, last - first),
        extent.source,
        extent.base + (first - extent.offset[dim]) * extent.strides[dim],
        extent.strides,
    )


def _moved(extent: Extent, dim: int, distance: int) -> Extent:
    return replace(extent, offset=_with(extent.offset, dim, extent.offset[dim] + distance))


def _unsqueezed(form: Form, dim: int) -> Form:
    dim = _dim(dim, len(form.shape) + 1)

    def wider(values: tuple[int, ...], value: int) -> tuple[int, ...]:
        return (*values[:dim], value, *values[dim:])

    extents = (
        replace(e, offset=wider(e.offset, 0), shape=wider(e.shape, 1), strides=wider(e.strides, 0))
        for e in form.extents
    )
    return Form(wider(form.shape, 1), tuple(extents))


def _squeezed(form: Form, dim: int) -> Form:
    def slimmer(values: tuple[int, ...]) -> tuple[int, ...]:
        return values[:dim] + values[dim + 1 :]

    extents = (
        replace(e, offset=slimmer(e.offset), shape=slimmer(e.shape), strides=slimmer(e.strides)) for e in form.extents
    )
    return Form(slimmer(form.shape), tuple(extents))


def _with(values: tuple[int, ...], dim: int, value: int) -> tuple[int, ...]:
    return (*values[:dim], value, *values[dim + 1 :])


def _dim(dim: int, ndim: int) -> int:
    if not -ndim <= dim < ndim:
        raise FormError(f"there is no dim {dim} among {ndim}")
    return dim % ndim


def _unravel(index: int, shape: Sequence[int]) -> tuple[int, ...]:
    coordinates: list[int] = []
    for stride in row_major(shape):
        coordinates.append(index // stride)
        index %= stride
    return tuple(coordinates)
