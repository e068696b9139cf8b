"""Faults of plans and models that the sweep over every MoE model met: each is refused, or runs correctly."""

from __future__ import annotations

import pytest
import transformers

from plans.errors import PlanError
from plans.mesh import Mesh
from runtime.models.model import meta_model
from runtime.planning.resolve import resolve
from tests.runtime.checks import odd_cases
from tests.runtime.rank_pool import RankPool
from tests.tiny_models import DENSE, MODELS


def test_a_row_wise_layer_given_a_whole_input_is_named(two_ranks: RankPool) -> None:
    message = r"part: 'rowwise' .* whose input is 32 wide, while this rank's slice of 32 is 16 wide"
    with pytest.raises(PlanError, match=message) as caught:
        two_ranks.run(odd_cases.run_whole_input_through_rowwise)
    assert "rowwise_split_input" in caught.value.hint


def test_experts_that_no_token_reaches_have_gradients_of_zero(two_ranks: RankPool) -> None:
    ranks = two_ranks.run(odd_cases.expert_gradients_after_one_token)
    names = ranks[0].keys()
    assert len(names) == 2 * DENSE["num_hidden_layers"]
    for name in names:
        assert sorted(gradients[name] > 0 for gradients in ranks) == [False, True], name


@pytest.mark.parametrize(
    ("family", "style", "order"),
    [("mixtral", "colwise", "one after the other"), ("gpt_oss", "packed_rowwise", "alternate")],
)
def test_experts_are_not_sharded_across_gate_and_up(family: str, style: str, order: str) -> None:
    class_names = {"mixtral": "MixtralForCausalLM", "gpt_oss": "GptOssForCausalLM"}
    sizes = {**MODELS["mixtral"][1], "num_experts_per_tok": 2}
    config_class = getattr(transformers, class_names[family].replace("ForCausalLM", "Config"))
    model = meta_model(config_class(**sizes, architectures=[class_names[family]]))
    experts = "model.layers.*.mlp.experts"
    plan = {f"{experts}.gate_up_proj": style, f"{experts}.down_proj": "rowwise", experts: "moe_tp_experts"}
    with pytest.raises(PlanError, match=f"gate_up_proj: '{style}' makes it .* gate and up (lie )?{order} there"):
        resolve(model, Mesh(tp=2), plan=plan)
