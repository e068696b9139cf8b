"""Sibling modules sum the gradient of a shared input once, and only when that is correct."""

from __future__ import annotations

import pytest

from tests.runtime.rank_pool import RankPool
from tests.runtime.styles import shared_input_cases


@pytest.mark.parametrize("calls", [1, 3])
def test_there_is_one_sum_for_each_call(two_ranks: RankPool, calls: int) -> None:
    for error, sums in two_ranks.run(shared_input_cases.errors_and_sums, calls):
        assert error < 1e-5
        assert sums == [30] * calls


def test_an_input_changed_in_place_is_used_as_changed(two_ranks: RankPool) -> None:
    assert max(two_ranks.run(shared_input_cases.output_after_change_in_place)) < 1e-6


def test_an_input_changed_in_place_is_summed_as_two_tensors(two_ranks: RankPool) -> None:
    for error, sums in two_ranks.run(shared_input_cases.backward_after_change_in_place):
        assert error < 1e-5
        assert sums == [30, 30]


def test_modules_called_alone_sum_by_themselves(two_ranks: RankPool) -> None:
    assert two_ranks.run(shared_input_cases.part_called_alone) == [[30, 30]] * 2


@pytest.mark.parametrize("fails", [False, True])
def test_no_input_is_kept_after_the_call(two_ranks: RankPool, fails: bool) -> None:
    assert two_ranks.run(shared_input_cases.is_input_kept_after_the_call, fails) == [False, False]


def test_second_derivatives_are_refused_rather_than_wrong(two_ranks: RankPool) -> None:
    for message in two_ranks.run(shared_input_cases.second_derivative):
        assert "once_differentiable" in message
