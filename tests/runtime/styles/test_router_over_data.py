"""Routers that mask their choices, as in the EP plans of transformers 5.17, with FSDP over the experts."""

from __future__ import annotations

import pytest

from plans.mesh import Mesh, Mode
from runtime import Plan
from tests.runtime.parallel import parity_cases
from tests.runtime.rank_pool import RankPool

ROUTED = {"model.layers.*.mlp.gate": "ep_router", "model.layers.*.mlp.experts": "moe_experts_allreduce"}


@pytest.mark.parametrize("mode", ["tp_ep", "sp_ep"])
def test_a_router_counts_the_experts_of_its_rank_under_fsdp(mode: Mode, four_ranks: RankPool) -> None:
    chosen = Plan.from_model(parity_cases.eager_config("qwen3_moe"), mode)
    plan = Plan(mode, {**chosen.entries, **ROUTED})
    for errors in four_ranks.run(parity_cases.compared, "qwen3_moe", plan, Mesh(tp=2, ep=2, fsdp=2)):
        assert errors.logits < 1e-5
        assert errors.worst[1] < 1e-5, errors.worst
