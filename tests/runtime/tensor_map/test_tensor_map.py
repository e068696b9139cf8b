"""Forms against torch: each operation on forms gives what the operation of torch gives on coordinates."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plans.placement import Packed, Placement, Replicate, Shard
from runtime.tensor_map.tensor_map import (
    TensorMap,
    TensorMapError,
    chunk,
    concatenate,
    narrow,
    reassemble,
    shard_for_rank,
    split,
    stack,
    transpose,
    unbind,
    whole,
)

Gather = Callable[[TensorMap, dict[str, torch.Tensor]], torch.Tensor]

shapes = st.lists(st.integers(0, 7), min_size=1, max_size=4).map(tuple)


def coordinates(shape: tuple[int, ...], start: int = 0) -> torch.Tensor:
    return torch.arange(start, start + prod(shape)).reshape(shape)


@given(shape=shapes, data=st.data())
def test_chunk_split_unbind_and_transpose(gather: Gather, shape: tuple[int, ...], data: st.DataObject) -> None:
    tensor, form = coordinates(shape), whole("t", shape)
    dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    other = data.draw(st.integers(-len(shape), len(shape) - 1))
    count = data.draw(st.integers(1, 9))
    cuts = sorted(data.draw(st.lists(st.integers(0, shape[dim]), max_size=3)))
    sizes = [b - a for a, b in zip([0, *cuts], [*cuts, shape[dim]], strict=True)]
    pairs = [
        (chunk(form, count, dim), torch.chunk(tensor, count, dim) if shape[dim] else (tensor,)),
        (split(form, sizes, dim), torch.split(tensor, sizes, dim)),
        (unbind(form, dim), torch.unbind(tensor, dim)),
        ((transpose(form, dim, other),), (tensor.transpose(dim, other),)),
    ]
    for forms, tensors in pairs:
        assert [piece.shape for piece in forms] == [tuple(piece.shape) for piece in tensors]
        for piece, expected in zip(forms, tensors, strict=True):
            assert torch.equal(gather(piece, {"t": tensor}), expected)


@given(shape=shapes, lengths=st.lists(st.integers(0, 4), min_size=1, max_size=4), data=st.data())
def test_concatenate_and_stack(gather: Gather, shape: tuple[int, ...], lengths: list[int], data: st.DataObject) -> None:
    dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    new = data.draw(st.integers(-len(shape) - 1, len(shape)))
    parts, equals = {}, {}
    for index, length in enumerate(lengths):
        sized = list(shape)
        sized[dim] = length
        parts[f"p{index}"] = coordinates(tuple(sized), 10_000 * index)
        equals[f"p{index}"] = coordinates(shape, 10_000 * index)
    joined = concatenate([whole(name, tensor.shape) for name, tensor in parts.items()], dim)
    assert torch.equal(gather(joined, parts), torch.cat(list(parts.values()), dim))
    stacked = stack([whole(name, tensor.shape) for name, tensor in equals.items()], new)
    assert torch.equal(gather(stacked, equals), torch.stack(list(equals.values()), new))


def test_operations_compose(gather: Gather) -> None:
    tensors = {
        f"{kind}{e}": coordinates((6, 5), 100 * e + 1000 * (kind == "up")) for e in range(4) for kind in ("gate", "up")
    }
    stacks = [stack([whole(f"{kind}{e}", (6, 5)) for e in range(4)], 0) for kind in ("gate", "up")]
    fused = concatenate(stacks, 1)
    expected = torch.cat([torch.stack([tensors[f"{kind}{e}"] for e in range(4)]) for kind in ("gate", "up")], 1)
    turned = narrow(transpose(fused, 1, 2), 2, 4, 5)
    assert torch.equal(gather(turned, tensors), expected.transpose(1, 2)[:, :, 4:9])


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(TensorMapError, match="do not join"):
        concatenate([whole("a", (2, 3)), whole("b", (2, 4))], 0)
    with pytest.raises(TensorMapError, match="nothing"):
        concatenate([], 0)
    with pytest.raises(TensorMapError, match="no dim"):
        transpose(whole("a", (2, 3)), 0, 2)
    with pytest.raises(TensorMapError, match="outside"):
        split(whole("a", (4,)), [3, 2], 0)
    with pytest.raises(TensorMapError, match="do not split"):
        split(whole("a", (4,)), [3], 0)
    with pytest.raises(TensorMapError, match="do not divide"):
        shard_for_rank(whole("a", (6,)), [Packed(0, 2)], [2], [0])


def one_axis(shape: tuple[int, ...], size: int) -> st.SearchStrategy[Placement]:
    packed = [
        Packed(dim, groups)
        for dim, length in enumerate(shape)
        for groups in (1, 2, 3)
        if length and length % (groups * size) == 0
    ]
    return st.sampled_from([Replicate(), *(Shard(dim) for dim in range(len(shape))), *packed])


@settings(max_examples=2000)
@given(
    shape=st.lists(st.sampled_from([1, 2, 3, 5, 6, 8, 12]), min_size=1, max_size=3).map(tuple),
    size=st.integers(1, 5),
    data=st.data(),
)
def test_local_forms_equal_dtensor(
    gather: Gather, dtensor_locals: Callable[..., dict], shape: tuple[int, ...], size: int, data: st.DataObject
) -> None:
    placement = data.draw(one_axis(shape, size))
    rank = data.draw(st.integers(0, size - 1))
    tensor = coordinates(shape)
    expected = dtensor_locals({"t": tensor}, {"t": [placement]}, rank, size)["t"]
    found = shard_for_rank(whole("t", shape), [placement], [size], [rank])
    assert found.shape == tuple(expected.shape)
    assert torch.equal(gather(found, {"t": tensor}), expected)


@given(
    shape=st.lists(st.sampled_from([0, 1, 2, 3, 4, 6, 12]), min_size=1, max_size=3).map(tuple),
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    data=st.data(),
)
def test_local_tensors_reassemble(
    gather: Gather, shape: tuple[int, ...], sizes: tuple[int, int], data: st.DataObject
) -> None:
    axes = [one_axis(shape, sizes[0] * sizes[1]), one_axis(shape, sizes[0] * sizes[1])]
    placements = [data.draw(axis) for axis in axes]
    tensor = coordinates(shape)
    holders = [
        (a, b)
        for a in range(sizes[0] if not isinstance(placements[0], Replicate) else 1)
        for b in range(sizes[1] if not isinstance(placements[1], Replicate) else 1)
    ]
    try:
        forms = {f"{a}.{b}": shard_for_rank(whole("t", shape), placements, sizes, (a, b)) for a, b in holders}
    except TensorMapError:
        return
    locals_ = {name: gather(form, {"t": tensor}) for name, form in forms.items()}
    assert torch.equal(gather(reassemble(shape, forms.items()), locals_), tensor)
