"""Modules side by side sum the gradient of an input they share once, and only where that is right."""

from __future__ import annotations

import pytest

from tests.runtime.rank_pool import RankPool
from tests.runtime.styles import shared_input_cases as summed_cases


@pytest.mark.parametrize("calls", [1, 3])
def test_one_sum_a_call_whatever_the_number_of_projections(two_ranks: RankPool, calls: int) -> None:
    for error, sums in two_ranks.run(summed_cases.errors_and_sums, calls):
        assert error < 1e-5
        assert sums == [30] * calls


def test_an_input_changed_in_place_is_not_taken_for_what_it_was(two_ranks: RankPool) -> None:
    assert max(two_ranks.run(summed_cases.output_after_change_in_place)) < 1e-6


def test_an_input_changed_in_place_is_summed_as_both_tensors_that_it_was(two_ranks: RankPool) -> None:
    for error, sums in two_ranks.run(summed_cases.backward_after_change_in_place):
        assert error < 1e-5
        assert sums == [30, 30]


def test_parts_called_alone_sum_by_themselves(two_ranks: RankPool) -> None:
    assert two_ranks.run(summed_cases.part_called_alone) == [[30, 30]] * 2


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_held_when_the_call_is_over(two_ranks: RankPool, fails: bool) -> None:
    assert two_ranks.run(summed_cases.held_after_the_call, fails) == [False, False]


def test_second_derivatives_are_refused_rather_than_wrong(two_ranks: RankPool) -> None:
    for said in two_ranks.run(summed_cases.second_derivative):
        assert "once_differentiable" in said
