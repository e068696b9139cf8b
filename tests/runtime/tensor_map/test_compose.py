"""Forms reshaped, turned round and seen through each other, against torch on coordinates."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from runtime.tensor_map.compose import compose, invert, reshape
from runtime.tensor_map.tensor_map import (
    TensorMap,
    TensorMapError,
    chunk,
    concatenate,
    narrow,
    permute,
    stack,
    transpose,
    whole,
)

Gather = Callable[[TensorMap, dict[str, torch.Tensor]], torch.Tensor]
Step = tuple[TensorMap, torch.Tensor]

shapes = st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4).map(tuple)


def coordinates(shape: tuple[int, ...], start: int = 0) -> torch.Tensor:
    return torch.arange(start, start + prod(shape)).reshape(shape)


@st.composite
def views(draw: st.DrawFn, count: int) -> tuple[int, ...]:
    """Draw a shape of so many elements."""
    shape: list[int] = []
    while count > 1:
        size = draw(st.sampled_from([n for n in range(2, count + 1) if count % n == 0]))
        shape.append(size)
        count //= size
    ones = draw(st.integers(0, 2))
    for _ in range(ones):
        shape.insert(draw(st.integers(0, len(shape))), 1)
    return tuple(shape)


@st.composite
def made(draw: st.DrawFn, name: str, start: int = 0) -> tuple[TensorMap, torch.Tensor, torch.Tensor]:
    """Draw a form over one source by several steps, with its tensor and the source's."""
    shape = draw(shapes)
    source = tensor = coordinates(shape, start)
    form = whole(name, shape)
    for _ in range(draw(st.integers(0, 4))):
        form, tensor = draw(st.sampled_from([permuted, viewed, rejoined]))(draw, form, tensor)
    return form, tensor, source


def permuted(draw: st.DrawFn, form: TensorMap, tensor: torch.Tensor) -> Step:
    order = draw(st.permutations(range(tensor.ndim)))
    return permute(form, order), tensor.permute(order)


def viewed(draw: st.DrawFn, form: TensorMap, tensor: torch.Tensor) -> Step:
    shape = draw(views(tensor.numel()))
    return reshape(form, shape), tensor.reshape(shape)


def rejoined(draw: st.DrawFn, form: TensorMap, tensor: torch.Tensor) -> Step:
    if not tensor.ndim:
        return form, tensor
    dim = draw(st.integers(0, tensor.ndim - 1))
    count = draw(st.integers(1, 3))
    forms, tensors = chunk(form, count, dim), torch.chunk(tensor, count, dim)
    order = draw(st.permutations(range(len(tensors))))
    return concatenate([forms[i] for i in order], dim), torch.cat([tensors[i] for i in order], dim)


@given(case=made("t"))
def test_reshapes_and_permutations_compose(gather: Gather, case: tuple[TensorMap, torch.Tensor, torch.Tensor]) -> None:
    form, tensor, source = case
    assert form.shape == tuple(tensor.shape)
    assert torch.equal(gather(form, {"t": source}), tensor)


@given(one=made("a"), other=made("b", 10_000))
def test_a_form_turned_round_gives_its_sources_back(
    gather: Gather,
    one: tuple[TensorMap, torch.Tensor, torch.Tensor],
    other: tuple[TensorMap, torch.Tensor, torch.Tensor],
) -> None:
    forms = {"x": one[0], "y": other[0]}
    tensors = {"x": one[1], "y": other[1]}
    sources = {"a": one[2], "b": other[2]}
    back = invert(forms, {name: tuple(source.shape) for name, source in sources.items()})
    for name, source in sources.items():
        assert torch.equal(gather(back[name], tensors), source)


@given(case=made("t"), data=st.data())
def test_a_form_through_another(
    gather: Gather, case: tuple[TensorMap, torch.Tensor, torch.Tensor], data: st.DataObject
) -> None:
    inner, tensor, source = case
    outer, expected = whole("x", inner.shape), tensor
    for _ in range(data.draw(st.integers(0, 3))):
        step = data.draw(st.sampled_from([permuted, viewed, rejoined, sliced]))
        outer, expected = step(data.draw, outer, expected)
    assert torch.equal(gather(compose({"x": inner})(outer), {"t": source}), expected)


def sliced(draw: st.DrawFn, form: TensorMap, tensor: torch.Tensor) -> Step:
    if not tensor.ndim:
        return form, tensor
    dim = draw(st.integers(0, tensor.ndim - 1))
    start = draw(st.integers(0, tensor.shape[dim] - 1))
    length = draw(st.integers(1, tensor.shape[dim] - start))
    return narrow(form, dim, start, length), tensor.narrow(dim, start, length)


def test_interleaved_halves_are_two_grids() -> None:
    pair = stack([whole("gate", (3, 4)), whole("up", (3, 4))], 2)
    form = reshape(pair, (3, 8))
    assert [(one.source, one.offset, one.shape, one.steps) for one in form.boxes] == [
        ("gate", (0, 0), (3, 4), (1, 2)),
        ("up", (0, 1), (3, 4), (1, 2)),
    ]


def test_what_lies_on_end_is_one_box() -> None:
    assert len(reshape(whole("t", (4, 2, 3)), (2, 12)).boxes) == 1


def test_another_number_of_elements_is_refused() -> None:
    with pytest.raises(TensorMapError, match="no view"):
        reshape(whole("t", (2, 3)), (7,))


def test_many_parts_are_found_by_where_they_lie(gather: Gather) -> None:
    pieces = {f"p{index}": coordinates((index % 3 + 1, 4), 100 * index) for index in range(20)}
    inner = concatenate([whole(name, tuple(piece.shape)) for name, piece in pieces.items()], 0)
    tensor = torch.cat(list(pieces.values()))
    for start in range(tensor.shape[0]):
        for length in range(1, tensor.shape[0] - start + 1):
            outer = transpose(narrow(whole("x", inner.shape), 0, start, length), 0, 1)
            assert torch.equal(gather(compose({"x": inner})(outer), pieces), tensor[start : start + length].T)
