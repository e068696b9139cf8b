"""Shards: the forms of what ranks hold of a tensor, and of a whole tensor over what they hold."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from plans.placement import Packed, Placement, Replicate, Shard
from runtime.extents.forms import (
    Extent,
    Form,
    FormError,
    chunk,
    chunk_bounds,
    concatenate,
    narrow,
    row_major,
    unravel,
)

__all__ = ["local_form", "reassemble"]


def local_form(form: Form, placements: Sequence[Placement], sizes: Sequence[int], coordinates: Sequence[int]) -> Form:
    """Return the form of the local tensor that a rank holds.

    Args:
        form: of the whole tensor.
        placements: one per mesh axis, outermost first. The innermost is applied first: FSDP, the outer one, cuts what
            tensor and expert parallelism leave.
        sizes: of the mesh axes.
        coordinates: the rank's index on each mesh axis.

    Raises:
        FormError: packed groups do not divide by their axis.
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
            extents.append(Extent(unravel(extent.base, shape), extent.shape, extent.steps, name, base, own))
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
