"""The two-sided check: what should be sharded and is not, what is and should not be, and what was untied."""

from __future__ import annotations

from typing import Any

import pytest

from plans.errors import MismatchError, UnknownStyleError
from plans.mesh import Mesh
from runtime import Plan, verify_plan
from tests.runtime.parallel import verify_cases
from tests.runtime.rank_pool import RankPool
from tests.tiny_models import tiny_config

EXPERTS = "model.layers.0.mlp.experts"


@pytest.mark.parametrize("mode", ["tp", "ep", "tp_ep", "sp", "sp_ep"])
def test_what_was_made_as_planned_is_accepted_before_and_after_a_step(mode: Any, two_ranks: RankPool) -> None:
    two_ranks.run(verify_cases.as_made, mode, Mesh(tp=2, ep=2 if mode.endswith("ep") else 1))


@pytest.mark.parametrize(
    ("mode", "mesh"),
    [
        ("tp", Mesh(tp=2, fsdp=2)),
        ("tp", Mesh(tp=1, fsdp=4)),
        ("tp_ep", Mesh(tp=2, ep=4, fsdp=2)),
        ("sp_ep", Mesh(tp=2, ep=2, fsdp=2)),
    ],
    ids=str,
)
def test_data_parallel_shards_are_checked_too(mode: Any, mesh: Mesh, four_ranks: RankPool) -> None:
    four_ranks.run(verify_cases.as_made, mode, mesh)


@pytest.mark.parametrize(("mode", "style"), [("tp", "moe_tp_down_rowwise"), ("tp", "moe_tp_gate_up_colwise")])
def test_a_style_that_silently_leaves_its_parameters_whole_is_found(mode: Any, style: str, two_ranks: RankPool) -> None:
    with pytest.raises(MismatchError, match=r"experts\.(down|gate_up)_proj: expected tp: .*, found whole") as caught:
        two_ranks.run(verify_cases.after_silent_style, mode, style)
    assert "a style left its parameters whole" in caught.value.hint


@pytest.mark.parametrize(
    ("name", "mode", "expected"),
    [
        (f"{EXPERTS}.down_proj", "tp", "tp: Shard(2), local shape [8, 32, 8]"),
        (f"{EXPERTS}.gate_up_proj", "ep", "ep: Shard(0), local shape [4, 32, 32]"),
        ("model.layers.1.mlp.down_proj.weight", "sp", "tp: Shard(1), local shape [32, 26]"),
        ("lm_head.weight", "tp_ep", "tp: Shard(0), local shape [51, 32]"),
    ],
)
def test_a_parameter_that_is_whole_where_the_plan_shards_it_is_named(
    name: str, mode: Any, expected: str, two_ranks: RankPool
) -> None:
    with pytest.raises(MismatchError) as caught:
        two_ranks.run(verify_cases.after_one_left_whole, name, mode)
    (found,) = caught.value.data["mismatches"]
    assert (found["name"], found["expected"]) == (name, expected)
    assert found["found"].startswith("whole, local shape")


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.0.mlp.gate.weight"])
def test_a_parameter_that_is_sharded_where_the_plan_keeps_it_whole_is_named(name: str, two_ranks: RankPool) -> None:
    with pytest.raises(MismatchError) as caught:
        two_ranks.run(verify_cases.after_one_too_many, name)
    (found,) = caught.value.data["mismatches"]
    assert found["name"] == name
    assert found["expected"].startswith("whole")
    assert found["found"].startswith("tp: Shard(0)")


def test_the_right_local_shape_along_the_wrong_dim_is_found(two_ranks: RankPool) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    with pytest.raises(MismatchError, match=r"expected tp: Shard\(0\), local shape \[16, 32\], found tp: Shard\(1\)"):
        two_ranks.run(verify_cases.after_wrong_dim, name)


def test_names_that_were_untied_are_found(two_ranks: RankPool) -> None:
    with pytest.raises(MismatchError, match=r"lm_head\.weight: expected tied to model\.embed_tokens\.weight"):
        two_ranks.run(verify_cases.after_untied)


def test_a_plan_without_an_entry_that_the_model_was_made_by_is_found(two_ranks: RankPool) -> None:
    with pytest.raises(MismatchError, match=r"lm_head\.weight: expected whole"):
        two_ranks.run(verify_cases.against_fewer_entries, "lm_head")


def test_a_model_that_was_never_made_parallel_is_found(two_ranks: RankPool) -> None:
    with pytest.raises(MismatchError, match=r"rank 0: \d+ differences from the plan: ") as caught:
        two_ranks.run(verify_cases.by_plan_on_plain_model)
    assert len(caught.value.data["mismatches"]) > 10


@pytest.mark.parametrize("how", ["forward", "module"])
@pytest.mark.parametrize(
    ("mode", "name", "style"),
    [
        ("tp", "model.layers.1.mlp.down_proj", "rowwise"),
        ("tp", "model.layers.0.mlp.experts", "moe_tp_experts"),
        ("sp", "model.norm", "activation"),
    ],
)
def test_a_module_that_lost_its_hook_is_named(mode: Any, name: str, style: str, how: str, two_ranks: RankPool) -> None:
    with pytest.raises(MismatchError) as caught:
        two_ranks.run(verify_cases.after_lost_hook, mode, name, how)
    (found,) = caught.value.data["mismatches"]
    assert (found["name"], found["expected"]) == (name, f"{style!r} around its forward")
    assert found["found"] == "a forward without a hook"


def test_what_wraps_a_hooked_forward_keeps_the_hook(two_ranks: RankPool) -> None:
    two_ranks.run(verify_cases.after_lost_hook, "tp", "model.layers.0.mlp.experts", "wrapped")


def test_a_plan_with_another_style_of_the_same_placement_is_found(two_ranks: RankPool) -> None:
    key = "model.layers.*.self_attn.o_proj"
    with pytest.raises(MismatchError, match=r"o_proj: expected 'rowwise_split_input' around .*, found 'rowwise'"):
        two_ranks.run(verify_cases.against_another_forward, key, "rowwise_split_input")


NAMES = [
    "model.embed_tokens.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.0.mlp.experts.gate_up_proj",
    "model.layers.0.mlp.experts.down_proj",
]


def test_entries_that_only_communicate_are_never_unused() -> None:
    forwards = {
        "model.layers.*.mlp.experts": "moe_experts_allreduce",
        "model.layers.*.mlp.gate": "ep_router",
        "model.layers.*.mlp": "module_allgather_split",
        "model.layers.*.input_layernorm": "activation",
        "model.layers.*.self_attn.q_norm": "replicated_with_grad_allreduce",
    }
    assert verify_plan(NAMES, forwards).unused == ()
    assert verify_plan(NAMES, forwards).whole == tuple(NAMES)


def test_entries_that_shard_weights_are_unused_where_nothing_has_their_name() -> None:
    plan = {
        "model.layers.*.self_attn.q_proj": "colwise",
        "model.layers.*.mlp.experts.gate_up_proj": "moe_tp_gate_up_colwise",
        "model.layers.*.mlp.experts.down_prj": "moe_tp_down_rowwise",
        "model.layers.1.self_attn.q_proj": "colwise",
    }
    found = verify_plan(NAMES, plan)
    assert found.unused == ("model.layers.*.mlp.experts.down_prj", "model.layers.1.self_attn.q_proj")
    assert found.whole == ("model.embed_tokens.weight", "model.layers.0.mlp.experts.down_proj")


def test_an_entry_on_a_bare_parameter_is_used() -> None:
    """Releases compare the names of owners only, and warn of every such entry."""
    assert verify_plan(NAMES, {"model.layers.*.mlp.experts.down_proj": "grouped_gemm"}).unused == ()


def test_a_chosen_plan_can_be_held_against_names() -> None:
    plan = Plan.from_model(tiny_config("mixtral"), "tp")
    assert "model.layers.*.self_attn.o_proj" in verify_plan(NAMES, plan).unused
    assert "model.layers.*.mlp.experts" not in verify_plan(NAMES, plan).unused


def test_a_style_that_no_dialect_has_is_refused() -> None:
    with pytest.raises(UnknownStyleError, match="colwize"):
        verify_plan(NAMES, {"model.layers.*.self_attn.q_proj": "colwize"})
