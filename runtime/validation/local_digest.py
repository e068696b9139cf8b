"""The share of a parameter's digest that one rank's local tensor contributes, summed where the tensor is."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from math import prod

import torch

from runtime.checkpoint.digest import Digest
from runtime.checkpoint.verifying.tensor_digest import digest_tensor
from runtime.extents.forms import TensorMap, row_major, unravel

__all__ = ["compute_local_digest"]


def compute_local_digest(local: torch.Tensor, tensor_map: TensorMap, shape: Sequence[int]) -> Digest:
    """Return the sums of a local tensor's bytes at their places in the parameter.

    Args:
        local: what the rank holds, on any device.
        tensor_map: of it over the whole parameter, as `runtime.extents.shards.local_form` gives it.
        shape: of the whole parameter.
    """
    assert tuple(local.shape) == tensor_map.shape
    sums = Digest()
    for extent in tensor_map.boxes:
        box = local[tuple(slice(start, start + size) for start, size in zip(extent.offset, extent.shape, strict=True))]
        sums.join(_compute_box_digest(box, unravel(extent.base, shape), shape))
    return sums


def _compute_box_digest(box: torch.Tensor, start: Sequence[int], shape: Sequence[int]) -> Digest:
    """Sum a box of a parameter, in as few calls as rows that lie evenly apart allow."""
    strides, size = row_major(shape), box.element_size()
    base = sum(index * stride for index, stride in zip(start, strides, strict=True))
    partial = [dim for dim in range(box.ndim) if box.shape[dim] != shape[dim]]
    inner = partial[-1] if partial else 0
    if inner == 0:
        return digest_tensor(box, base * size)
    outer = max((dim for dim in partial if dim < inner), default=0)
    sums = Digest()
    for place in product(*(range(length) for length in box.shape[:outer])):
        offset = base + sum(index * stride for index, stride in zip(place, strides, strict=False))
        rows = box[place].reshape(prod(box.shape[outer:inner]), -1)
        sums.join(digest_tensor(rows, offset * size, strides[inner - 1] * size))
    return sums
