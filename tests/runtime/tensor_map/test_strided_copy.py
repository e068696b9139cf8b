"""The run table: lowered right, cut right, and the proof that finds every gap and overlap."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.tensor_map.strided_copy import Stride, StridedCopy, covers, plan_copies, split_at_blocks
from runtime.tensor_map.tensor_map import (
    TensorMap,
    TensorMapError,
    concatenate,
    narrow,
    row_major,
    stack,
    transpose,
    whole,
)


def moved(run: StridedCopy) -> list[tuple[int, int]]:
    """Return (source byte, destination byte) of every byte that a run moves."""
    pairs = []
    for index in product(*(range(repeat.steps) for repeat in run.strides)):
        source = run.source_offset + sum(i * r.source_stride for i, r in zip(index, run.strides, strict=True))
        target = run.destination_offset + sum(i * r.destination_stride for i, r in zip(index, run.strides, strict=True))
        pairs += [(source + byte, target + byte) for byte in range(run.length)]
    return pairs


@st.composite
def forms(draw: st.DrawFn) -> TensorMap:
    """Forms as conversions make them: stacked, joined, sliced and transposed at random."""
    shape = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple))
    form = whole("s", shape)
    for _ in range(draw(st.integers(0, 4))):
        dim = draw(st.integers(0, len(form.shape) - 1))
        kind = draw(st.sampled_from(["narrow", "concatenate", "stack", "transpose"]))
        if kind == "narrow" and form.shape[dim] > 1:
            start = draw(st.integers(0, form.shape[dim] - 1))
            form = narrow(form, dim, start, draw(st.integers(1, form.shape[dim] - start)))
        elif kind == "concatenate":
            form = concatenate([form, form], dim)
        elif kind == "stack" and len(form.shape) < 4:
            form = stack([form, form], dim)
        elif kind == "transpose":
            form = transpose(form, dim, draw(st.integers(0, len(form.shape) - 1)))
    return form


def expected_moves(form: TensorMap, size: int) -> set[tuple[int, int]]:
    strides = row_major(form.shape)
    moves = set()
    for extent in form.boxes:
        for index in product(*(range(n) for n in extent.shape)):
            source = extent.base + sum(i * s for i, s in zip(index, extent.strides, strict=True))
            target = sum((o + i) * s for o, i, s in zip(extent.offset, index, strides, strict=True))
            moves |= {(source * size + byte, target * size + byte) for byte in range(size)}
    return moves


@given(form=forms(), size=st.sampled_from([1, 2, 8]), block=st.integers(1, 40))
def test_runs_move_what_the_form_says_however_cut(form: TensorMap, size: int, block: int) -> None:
    runs = list(plan_copies(form, size * 8, {"s": 0}, 0))
    assert len(runs) == len(form.boxes)
    assert sorted(pair for run in runs for pair in moved(run)) == sorted(expected_moves(form, size))
    for run in runs:
        parts = list(split_at_blocks(run, block))
        assert all(number == source // block for number, part in parts for source, _ in moved(part))
        assert sorted(pair for _, part in parts for pair in moved(part)) == sorted(moved(run))
        assert sum(part.size for _, part in parts) == run.size


@given(form=forms(), data=st.data())
def test_the_proof_agrees_with_counting_bytes(form: TensorMap, data: st.DataObject) -> None:
    runs = list(plan_copies(form, 16, {"s": 0}, 0))
    size = int(np.prod(form.shape)) * 2
    assert covers(runs, {0: size})
    damage = data.draw(st.sampled_from(["drop", "repeat", "shift", "shorten", "resize"]))
    victim = data.draw(st.integers(0, len(runs) - 1))
    run = runs[victim]
    changed = {
        "drop": [],
        "repeat": [run, run],
        "shift": [run._replace(destination_offset=run.destination_offset + data.draw(st.sampled_from([-2, 1, 2])))],
        "shorten": [run._replace(length=run.length - 1)],
        "resize": [run],
    }[damage]
    runs[victim : victim + 1] = changed
    size += 2 * (damage == "resize")
    written = np.zeros(size + 64, int)
    for run in runs:
        for _, target in moved(run):
            written[target if target >= 0 else -1] += 1
    right = bool((written[:size] == 1).all() and not written[size:].any())
    assert covers(runs, {0: size}) == right
    assert not right


def test_a_block_of_columns_is_one_run() -> None:
    half = narrow(whole("s", (1000, 64)), 1, 32, 32)
    assert list(plan_copies(half, 16, {"s": 7}, 3)) == [StridedCopy(7, 64, 3, 0, 64, (Stride(1000, 128, 64),))]
    assert list(plan_copies(whole("s", (5, 6, 7)), 8, {"s": 0}, 0)) == [StridedCopy(0, 0, 0, 0, 210)]


def test_the_proof_scales() -> None:
    stacked = stack([whole(f"{e}", (4, 6)) for e in range(20_000)], 0)
    both = concatenate([stacked, stacked], 2)
    runs = list(plan_copies(both, 16, {f"{e}": e for e in range(20_000)}, 0))
    assert len(runs) == 40_000
    assert covers(runs, {0: 20_000 * 4 * 12 * 2})
    assert not covers(runs[:-1], {0: 20_000 * 4 * 12 * 2})


def test_unwritten_and_unknown_regions_are_found() -> None:
    assert covers([], {0: 0})
    assert not covers([], {0: 1})
    assert not covers([StridedCopy(0, 0, 1, 0, 4)], {0: 0})


def test_four_bit_elements_are_moved_whole_bytes_only() -> None:
    form = whole("s", (4, 6))
    assert list(plan_copies(narrow(form, 1, 2, 4), 4, {"s": 0}, 0)) == [StridedCopy(0, 1, 0, 0, 2, (Stride(4, 3, 2),))]
    with pytest.raises(TensorMapError, match="within a byte"):
        list(plan_copies(narrow(form, 1, 1, 4), 4, {"s": 0}, 0))
    with pytest.raises(TensorMapError, match="within a byte"):
        list(plan_copies(transpose(form, 0, 1), 4, {"s": 0}, 0))
