"""Which entries work over the expert axis, and what a dense plan and an expert plan are together."""

from __future__ import annotations

from typing import Any

import pytest

from plans.dialect import PARAM_LEVEL, dialect_for_release, load_dialect
from plans.plan import find_expert_keys, find_expert_modules, merge_expert_plan

DIALECT = dialect_for_release("5.23.0").with_overrides(load_dialect(PARAM_LEVEL)).with_defaults(load_dialect("dtensor"))

DENSE = {
    "layers.*.self_attn.q_proj": "colwise",
    "layers.*.mlp.experts.gate_up_proj": "moe_tp_gate_up_colwise",
    "layers.*.mlp.experts.down_proj": "moe_tp_down_rowwise",
    "layers.*.mlp.experts": "moe_experts_allreduce",
    "layers.*.mlp.shared_experts.down_proj": "rowwise",
}
ROUTED = {
    "layers.*.mlp.gate": "ep_router",
    "layers.*.mlp.experts.gate_up_proj": "grouped_gemm",
    "layers.*.mlp.experts.down_proj": "grouped_gemm",
    "layers.*.mlp.experts": "moe_experts_allreduce",
}
DISPATCHED = {
    "layers.*.mlp.experts.gate_up_proj": "grouped_gemm",
    "layers.*.mlp.experts.down_proj": "grouped_gemm",
    "layers.*.mlp.experts": "ep_dispatch_experts",
}


def numbered(plan: dict[str, str], layer: int = 0) -> dict[str, str]:
    return {key.replace("*", str(layer)): style for key, style in plan.items()}


def test_experts_modules_are_recognized_by_parameters_or_hook() -> None:
    assert find_expert_modules(DENSE, DIALECT) == frozenset()
    assert find_expert_modules(ROUTED, DIALECT) == {"layers.*.mlp.experts"}
    assert find_expert_modules({"layers.*.mlp.experts": "ep_dispatch_experts"}, DIALECT) == {"layers.*.mlp.experts"}


def test_a_merged_plan_gives_experts_parameters_grouped_gemm() -> None:
    for experts in (ROUTED, DISPATCHED):
        found = merge_expert_plan(DENSE, experts, DIALECT)
        assert found.items() >= experts.items()
        assert found.keys() - experts.keys() == {"layers.*.self_attn.q_proj", "layers.*.mlp.shared_experts.down_proj"}


def test_entries_that_shard_whole_experts_are_dropped_even_if_the_expert_plan_lacks_them() -> None:
    found = merge_expert_plan(DENSE, {"layers.*.mlp.experts": "ep_dispatch_experts"}, DIALECT)
    assert not [style for style in found.values() if style.startswith("moe_tp_")]
    bias = {**DENSE, "layers.*.mlp.experts.gate_up_proj_bias": "packed_colwise"}
    assert "layers.*.mlp.experts.gate_up_proj_bias" not in merge_expert_plan(bias, ROUTED, DIALECT)


def test_entries_that_do_not_shard_experts_stay() -> None:
    dense = {"layers.*.mlp": "module_allgather_split", "layers.*.mlp.experts.act": "replicate"}
    assert merge_expert_plan(dense, ROUTED, DIALECT).items() >= dense.items()


@pytest.mark.parametrize("experts", [ROUTED, DISPATCHED])
def test_numbered_entries_of_a_dense_plan_are_replaced_too(experts: dict[str, str]) -> None:
    dense = {**numbered(DENSE), "layers.0.mlp": "module_allgather_split", "layers.1.mlp": "module_allgather"}
    found = merge_expert_plan(dense, experts, DIALECT)
    assert {key for key in found if "experts" in key and "shared" not in key} == {
        key for key in experts if "experts" in key
    }
    assert found.keys() >= {"layers.0.mlp", "layers.1.mlp", "layers.0.self_attn.q_proj"}


def test_numbered_entries_of_an_expert_plan_leave_other_layers_as_they_are() -> None:
    found = merge_expert_plan(DENSE, numbered(DISPATCHED, 1), DIALECT)
    assert found == {**DENSE, **numbered(DISPATCHED, 1)}


@pytest.mark.parametrize("mode", ["tp", "sp"])
def test_without_an_expert_axis_no_entry_uses_it(mode: Any) -> None:
    assert find_expert_keys(merge_expert_plan(DENSE, ROUTED, DIALECT), mode, DIALECT) == frozenset()


def test_in_mode_ep_every_entry_uses_the_expert_axis() -> None:
    assert find_expert_keys(ROUTED, "ep", DIALECT) == ROUTED.keys()


@pytest.mark.parametrize("mode", ["tp_ep", "sp_ep"])
@pytest.mark.parametrize("experts", [ROUTED, DISPATCHED])
def test_in_combined_modes_experts_and_routers_use_the_expert_axis(mode: Any, experts: dict[str, str]) -> None:
    plan = merge_expert_plan(DENSE, experts, DIALECT)
    assert find_expert_keys(plan, mode, DIALECT) == experts.keys()


def test_a_numbered_hook_uses_the_axis_of_its_parameters() -> None:
    plan = {**ROUTED, "layers.0.mlp.experts": "moe_experts_allreduce", "layers.0.mlp": "module_allgather_split"}
    assert "layers.0.mlp.experts" in find_expert_keys(plan, "tp_ep", DIALECT)
    assert "layers.0.mlp" not in find_expert_keys(plan, "tp_ep", DIALECT)
