"""Experts divided and cut: placements, local shapes, router tables, and what may not stand alone."""

from __future__ import annotations

from typing import Any

import pytest

from plans.errors import IndivisibleError, PlanError, UnknownStyleError, UnmatchedKeyError
from plans.mesh import Mesh
from plans.plan import find_key
from runtime.styles import STYLES
from tests.runtime.rank_pool import RankPool
from tests.runtime.styles import expert_cases
from tests.runtime.styles.expert_cases import EXPERTS, PLANS

LAYER = "model.layers.0.mlp"


def find_style(plan: str, name: str, *, is_parameter: bool) -> str | None:
    key = find_key(PLANS[plan], name, is_parameter=is_parameter)
    return None if key is None else PLANS[plan][key]


def test_an_expert_plans_parameter_keys_name_grouped_gemm() -> None:
    for name in ("gate_up_proj", "down_proj"):
        assert find_style("ep", f"{LAYER}.experts.{name}", is_parameter=True) == "grouped_gemm"


def test_a_decomposed_plan_names_each_parameters_own_style() -> None:
    assert find_style("tp", f"{LAYER}.experts.gate_up_proj", is_parameter=True) == "moe_tp_gate_up_colwise"
    assert find_style("tp", f"{LAYER}.experts.down_proj", is_parameter=True) == "moe_tp_down_rowwise"


def test_modules_get_their_own_entries_never_those_of_a_child() -> None:
    assert find_style("ep", f"{LAYER}.experts", is_parameter=False) == "moe_experts_allreduce"
    assert find_style("ep", f"{LAYER}.gate", is_parameter=False) == "ep_router"
    children = {key: style for key, style in PLANS["ep"].items() if key != EXPERTS}
    assert find_key(children, f"{LAYER}.experts", is_parameter=False) is None


def test_expert_parallelism_shards_dim_0_of_both_and_counts_local_experts(two_ranks: RankPool) -> None:
    for found in two_ranks.run(expert_cases.local_experts, "ep"):
        assert found == {
            "num_experts": 2,
            "gate_up_proj": ([2, 32, 8], "shard 0"),
            "down_proj": ([2, 8, 16], "shard 0"),
        }


def test_tensor_parallelism_shards_every_expert_and_counts_all_of_them(two_ranks: RankPool) -> None:
    for found in two_ranks.run(expert_cases.local_experts, "tp"):
        assert found == {
            "num_experts": 4,
            "gate_up_proj": ([4, 16, 8], "strided 1 by 2"),
            "down_proj": ([4, 8, 8], "shard 2"),
        }


def test_a_merged_plan_shards_dim_0(two_ranks: RankPool) -> None:
    for found in two_ranks.run(expert_cases.local_experts, "tp_ep"):
        assert found["num_experts"] == 2
        assert {found[name][1] for name in ("gate_up_proj", "down_proj")} == {"shard 0"}


@pytest.mark.parametrize("mode", ["tp", "ep"])
@pytest.mark.parametrize("world_size", [2, 4])
def test_the_branchs_own_plans_compute_the_same_as_the_whole_model(
    mode: Any, world_size: int, request: pytest.FixtureRequest
) -> None:
    pool: RankPool = request.getfixturevalue({2: "two_ranks", 4: "four_ranks"}[world_size])
    for errors in pool.run(expert_cases.experts_errors, mode):
        assert f"{LAYER}.gate.weight" in errors
        assert max(errors.values()) < 1e-5, errors


LOGITS, LOSS = [[0.0, 1.0, 2.0, 3.0], [4.0, 5.0, 6.0, 7.0]], 2.0


@pytest.mark.parametrize(
    ("outputs", "order", "gradient"),
    [
        ("weights, index", "wi", 2.0),
        ("index, weights", "iw", 2.0),
        ("logits, weights, index", "lwi", 30.0),
        ("logits, weights, index, loss", "lwis", 32.0),
    ],
)
def test_a_router_keeps_the_choices_of_its_rank(outputs: str, order: str, gradient: float, two_ranks: RankPool) -> None:
    """Of the choices [[0, 3], [2, 1]] among 4 experts, those of the other rank get the number 2 and the weight 0.

    The weights' gradient, partial on each rank, is summed; that of all other outputs is whole already.
    """
    expected: list[dict[str, object]] = [
        {"i": [[0, 2], [2, 1]], "w": [[0.75, 0.0], [0.0, 0.5]]},
        {"i": [[2, 1], [0, 2]], "w": [[0.0, 0.25], [0.5, 0.0]]},
    ]
    for outputs_of_rank, (values, input_gradient) in zip(
        expected, two_ranks.run(expert_cases.run_router, outputs), strict=True
    ):
        assert values == [{**outputs_of_rank, "l": LOGITS, "s": LOSS}[name] for name in order]
        assert input_gradient == [gradient, gradient]


def test_a_router_of_one_local_expert_has_two_numbers(four_ranks: RankPool) -> None:
    found = four_ranks.run(expert_cases.run_router, "weights, index")
    assert [index for (_, index), _ in found] == [
        [[0, 1], [1, 1]],
        [[1, 1], [1, 0]],
        [[1, 1], [0, 1]],
        [[1, 0], [1, 1]],
    ]
    assert sum(weights[0][0] for (weights, _), _ in found) == 0.75


def test_the_experts_hook_does_not_shard(two_ranks: RankPool) -> None:
    only = {EXPERTS: "moe_experts_allreduce"}
    with pytest.raises(PlanError, match="whose parameters are whole: its output would be multiplied by 2") as caught:
        two_ranks.run(expert_cases.parallelize_mixtral, "tp", only)
    assert "moe_tp_gate_up_colwise" in caught.value.hint


def test_parameter_styles_have_no_hook_and_routing_styles_have_one() -> None:
    for name in ("moe_tp_gate_up_colwise", "moe_tp_down_rowwise", "grouped_gemm"):
        assert STYLES.styles[name].around is None, name
    for name in ("moe_experts_allreduce", "moe_tp_experts", "ep_router", "ep_dispatch_experts"):
        assert STYLES.styles[name].around is not None, name


@pytest.mark.parametrize(
    ("plan", "error", "message"),
    [
        ({EXPERTS: "ep_dispatch_experts"}, PlanError, "whose experts are not divided"),
        ({"model.layers.*.mlp.gate": "ep_router"}, PlanError, "beside which no experts are divided"),
        (
            {f"{EXPERTS}.gate_up_proj": "grouped_gemm", f"{EXPERTS}.down_proj": "grouped_gemm"},
            PlanError,
            "no plan entry hooks model.layers.0.mlp.experts",
        ),
        ({EXPERTS: "megamoe_experts"}, UnknownStyleError, "megamoe_experts"),
        ({f"{EXPERTS}.gate_proj": "grouped_gemm"}, UnmatchedKeyError, "gate_proj"),
        (
            {f"{EXPERTS}.gate_up_proj": "grouped_gemm", EXPERTS: "ep_dispatch_experts"},
            PlanError,
            "down_proj",
        ),
        (
            {
                f"{EXPERTS}.gate_up_proj": "grouped_gemm",
                f"{EXPERTS}.down_proj": "moe_tp_down_rowwise",
                EXPERTS: "ep_dispatch_experts",
            },
            PlanError,
            "down_proj",
        ),
    ],
)
def test_expert_plans_that_cannot_be_correct_are_refused(
    plan: dict[str, str], error: type[Exception], message: str, two_ranks: RankPool
) -> None:
    with pytest.raises(error, match=message):
        two_ranks.run(expert_cases.parallelize_mixtral, "ep", plan)


def test_a_dispatch_without_its_router_is_refused(two_ranks: RankPool) -> None:
    """Under expert parallelism the branch's hook trusts a router that masks; without one other ranks' experts count."""
    plan = {key: style for key, style in PLANS["ep"].items() if style != "ep_router"}
    with pytest.raises(PlanError, match="whose routing nothing masks") as caught:
        two_ranks.run(expert_cases.parallelize_mixtral, "ep", plan)
    assert caught.value.hint == f"use 'ep_dispatch_experts' for {EXPERTS!r}"


def test_experts_over_ranks_whose_outputs_nothing_sums_are_refused(two_ranks: RankPool) -> None:
    with pytest.raises(PlanError, match="the experts of this rank only: nothing would sum their outputs"):
        two_ranks.run(expert_cases.parallelize_mixtral, "ep", {**PLANS["ep"], EXPERTS: "all_reduce"})


def test_sharded_experts_whose_outputs_nothing_sums_are_refused(two_ranks: RankPool) -> None:
    with pytest.raises(PlanError, match="gate_up_proj is sharded: its output would be partial"):
        two_ranks.run(expert_cases.parallelize_mixtral, "tp", {**PLANS["tp"], EXPERTS: "local_params"})


@pytest.mark.parametrize(("mode", "plan"), [("tp", "ep"), ("ep", "tp")])
def test_a_plan_is_correct_over_either_axis(mode: Any, plan: str, two_ranks: RankPool) -> None:
    for errors in two_ranks.run(expert_cases.experts_errors, mode, plan):
        assert max(errors.values()) < 1e-5, errors


def test_experts_masked_twice_are_refused(two_ranks: RankPool) -> None:
    with pytest.raises(PlanError, match="whose routing ep_router already masks"):
        two_ranks.run(expert_cases.parallelize_mixtral, "ep", {**PLANS["ep"], EXPERTS: "ep_dispatch_experts"})


def test_experts_that_do_not_divide_are_refused() -> None:
    with pytest.raises(IndivisibleError, match=r"ep=3 does not divide the experts of .*gate_up_proj, 4") as caught:
        expert_cases.resolve_mixtral(Mesh(tp=3, ep=3))
    assert caught.value.hint == "sizes that work: 1, 2, 4"
