"""Layers over pipeline stages: the ranges that the releases' own examples give, and that none is lost or doubled."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plans.pipeline import find_split, split_layers

LAST = [range(0, 10), range(10, 20), range(20, 32)]
FIRST = [range(0, 11), range(11, 22), range(22, 32)]


@pytest.mark.parametrize(
    ("version", "expected", "tensor_parallel"),
    [
        ("5.16.0", LAST, False),
        ("5.17.0", LAST, False),
        ("5.18.0", LAST, True),
        ("5.23.1", LAST, True),
        ("5.24.0.dev0", FIRST, True),
        ("5.24.0", FIRST, True),
        ("99.0.0", FIRST, True),
    ],
)
def test_the_remainder_goes_where_the_release_puts_it(
    version: str, expected: list[range], tensor_parallel: bool
) -> None:
    split = find_split(version)
    assert split is not None
    assert split_layers(32, 3, split.remainder) == expected
    assert split.tensor_parallel == tensor_parallel


def test_releases_before_5_16_have_no_stages() -> None:
    assert find_split("5.15.2") is None


@given(st.integers(1, 200), st.integers(1, 70), st.sampled_from(["first", "last"]))
def test_every_layer_is_on_one_stage_in_order(count: int, stages: int, remainder: str) -> None:
    ranges = split_layers(count, stages, remainder)  # type: ignore[arg-type]
    assert len(ranges) == stages
    assert [layer for layers in ranges for layer in layers] == list(range(count))
    assert min(map(len, ranges)) == count // stages
