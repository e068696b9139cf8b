"""Wrong use of `parallelize`: one clear error on every rank, never a hang, never a wrong number."""

from __future__ import annotations

import traceback
from typing import Any

import pytest

from plans.errors import IndivisibleError, PlanError, UnknownStyleError, UnmatchedKeyError, UsageError
from plans.mesh import Mesh
from runtime import Plan, parallelize
from tests.runtime.parallel import wrong_use_cases
from tests.runtime.rank_pool import RankPool
from tests.runtime.styles.expert_cases import PLANS, mixtral


@pytest.mark.parametrize(
    ("plan", "error", "message"),
    [
        ({"lm_head": "colwize"}, UnknownStyleError, "'lm_head': the dialect .* has no style 'colwize'"),
        ({"lm_head": "colwise_loss_parallel"}, UnknownStyleError, "'colwise_loss_parallel' cannot run here"),
        ({"model.layers.*.mlp.expert": "moe_tp_experts"}, UnmatchedKeyError, "'expert'"),
        ({"layers.*.mlp.experts": "moe_tp_experts"}, UnmatchedKeyError, "'layers'"),
        ({"model.layers.7.self_attn.q_proj": "colwise"}, UnmatchedKeyError, "'7'"),
    ],
)
def test_plans_that_name_what_there_is_not(
    plan: dict[str, str], error: type[Exception], message: str, two_ranks: RankPool
) -> None:
    with pytest.raises(error, match=message):
        two_ranks.run(wrong_use_cases.with_plan, plan)


def test_a_mistyped_style_is_known_again(two_ranks: RankPool) -> None:
    with pytest.raises(UnknownStyleError) as caught:
        two_ranks.run(wrong_use_cases.with_plan, {"lm_head": "colwize"})
    assert caught.value.hint.startswith("did you mean colwise? styles that can run: ")


@pytest.mark.parametrize(
    ("mode", "axes", "message"),
    [
        ("ep", ("tp",), "mode 'ep' on a mesh of tp=2, ep=1, fsdp=1: it needs an expert axis"),
        ("tp_ep", ("fsdp", "tp"), "mode 'tp_ep' on a mesh of tp=2, ep=1, fsdp=1: it needs an expert axis"),
        ("tp", ("ep",), "mode 'tp' on a mesh of tp=2, ep=2, fsdp=1: it uses no expert axis"),
        ("tp_ep", ("ep",), "needs the mesh axis 'tp', but the device mesh has ep"),
        ("tp", ("model",), r"a device mesh with the axes \('model',\) cannot carry a plan"),
        ("tp", ("tp", "fsdp"), r"a device mesh with the axes \('tp', 'fsdp'\) cannot carry a plan"),
    ],
)
def test_a_mesh_without_the_plans_axis(mode: Any, axes: tuple[str, ...], message: str, two_ranks: RankPool) -> None:
    with pytest.raises(UsageError, match=message):
        two_ranks.run(wrong_use_cases.on_device_mesh, mode, axes)


@pytest.mark.parametrize(("mode", "axes"), [("tp", ("tp",)), ("tp", ("fsdp", "tp")), ("ep", ("ep",)), ("sp", ("tp",))])
def test_a_device_mesh_of_the_right_axes_will_do(mode: Any, axes: tuple[str, ...], two_ranks: RankPool) -> None:
    two_ranks.run(wrong_use_cases.on_device_mesh, mode, axes)


def test_a_part_of_a_device_mesh_will_do_or_is_refused(two_ranks: RankPool) -> None:
    """Torch 2.8 takes no axis of it, and has an error of its own for that."""
    for refused in two_ranks.run(wrong_use_cases.on_part_of_a_device_mesh):
        assert not refused or "cannot slice the axis 'fsdp' from this device mesh: Cannot create a submesh" in refused


def test_experts_that_do_not_divide(four_ranks: RankPool) -> None:
    with pytest.raises(IndivisibleError, match=r"ep=4 does not divide the experts of .*, 6") as caught:
        four_ranks.run(wrong_use_cases.with_chosen_plan, "six_experts", "ep", Mesh(tp=4, ep=4))
    assert caught.value.hint == "sizes that work: 1, 2, 3, 6"


@pytest.mark.parametrize("mode", ["tp", "ep", "tp_ep", "sp"])
def test_a_model_that_is_parallel_already(mode: Any, two_ranks: RankPool) -> None:
    with pytest.raises(UsageError, match="this Qwen3MoeForCausalLM is parallel already"):
        two_ranks.run(wrong_use_cases.twice, mode)


@pytest.mark.parametrize("part", ["", "model", "model.layers.0"])
def test_a_model_whose_plan_only_hooked_is_parallel_too(part: str, two_ranks: RankPool) -> None:
    with pytest.raises(UsageError, match="is parallel already"):
        two_ranks.run(wrong_use_cases.twice_by_forwards, part)


@pytest.mark.parametrize(
    ("key", "named", "style"),
    [
        ("model.embed_tokens", "model.embed_tokens", "vocab_reduce_scatter"),
        ("model.norm", "model.norm", "activation"),
        ("lm_head", "lm_head", "colwise_gather_output"),
        ("model.layers.*.input_layernorm", "model.layers.0.input_layernorm", "activation"),
    ],
)
def test_a_sequence_plan_that_forgets_an_end_of_the_stream(
    key: str, named: str, style: str, two_ranks: RankPool
) -> None:
    with pytest.raises(PlanError, match=rf"{named} would .* the whole sequence") as caught:
        two_ranks.run(wrong_use_cases.without_entry, key)
    assert f"add the entry {key!r}: {style!r}" in caught.value.hint


def test_the_hint_shows_in_a_traceback() -> None:
    assert "hint: choose one of tp, ep" in "".join(traceback.format_exception(caught_error()))


def caught_error() -> UsageError:
    with pytest.raises(UsageError) as caught:
        Plan.from_model(mixtral(), "pp")  # type: ignore[arg-type]
    return caught.value


def test_a_router_entry_without_divided_experts_beside_it(two_ranks: RankPool) -> None:
    with pytest.raises(PlanError, match=r"mlp\.gate: 'ep_router' .* beside which no experts are divided"):
        two_ranks.run(wrong_use_cases.with_plan, {**PLANS["tp"], "model.layers.*.mlp.gate": "ep_router"})


@pytest.mark.parametrize("hook", ["moe_experts_allreduce", "moe_tp_experts", "ep_dispatch_experts"])
def test_an_experts_hook_without_sharded_parameters(hook: str, two_ranks: RankPool) -> None:
    with pytest.raises(PlanError, match="its output would be multiplied by 2"):
        two_ranks.run(wrong_use_cases.with_plan, {"model.layers.*.mlp.experts": hook})


def test_half_a_plan_whose_whole_half_would_meet_a_slice(two_ranks: RankPool) -> None:
    plan = {key: style for key, style in PLANS["tp"].items() if not key.endswith("down_proj")}
    with pytest.raises(PlanError, match="down_proj"):
        two_ranks.run(wrong_use_cases.with_plan, plan)


def test_no_process_group() -> None:
    with pytest.raises(UsageError, match="a device mesh needs a process group"):
        parallelize(mixtral(), Mesh(tp=2), Plan("tp", PLANS["tp"]))


def test_a_parallel_model_is_not_copied_with_the_originals_hooks(two_ranks: RankPool) -> None:
    with pytest.raises(UsageError, match="a parallel model cannot be deep-copied") as caught:
        two_ranks.run(wrong_use_cases.copied)
    assert "state_dict" in caught.value.hint


def test_what_ranks_hold_summands_of_is_not_gathered(two_ranks: RankPool) -> None:
    with pytest.raises(
        UsageError, match=r"weight has the placement .*, which is neither a shard nor a replica"
    ) as caught:
        two_ranks.run(wrong_use_cases.gathered_partial)
    assert caught.value.data["name"] == "weight"


def test_a_mode_is_no_plan(two_ranks: RankPool) -> None:
    with pytest.raises(UsageError, match="'sp' is not a plan") as caught:
        two_ranks.run(wrong_use_cases.with_plan, "sp")
    assert "Plan.from_model" in caught.value.hint


@pytest.mark.parametrize("mode", ["tp", "ep"])
def test_what_experts_sum_is_not_summed_again(mode: Any, two_ranks: RankPool) -> None:
    with pytest.raises(PlanError, match=r"mlp\.experts sums its own output: it would count 2 times"):
        two_ranks.run(wrong_use_cases.with_plan_besides, "mixtral", {"model.layers.*.mlp": "all_reduce"}, mode)


@pytest.mark.parametrize(("name", "below"), [("llama", "down_proj"), ("qwen3_moe", "experts")])
def test_what_a_layer_sums_is_not_summed_again(name: str, below: str, two_ranks: RankPool) -> None:
    with pytest.raises(PlanError, match=rf"mlp\.{below} sums its own output: it would count 2 times"):
        two_ranks.run(wrong_use_cases.with_plan_besides, name, {"model.layers.*.mlp": "all_reduce"})
