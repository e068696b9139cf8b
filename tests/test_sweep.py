"""A sample of `make sweep`."""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import patch

import pytest

from benchmarks.sweep_cases import Case
from benchmarks.sweep_plans import rewritten_cases
from benchmarks.sweep_rows import Result, run_case
from plans.mesh import Mode
from tests.runtime.rank_pool import RankPool


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    return {case.name: case for case in rewritten_cases(tmp_path_factory.mktemp("sweep") / "models")}


def test_every_class_that_the_rewrite_changes_is_among_the_cases(cases: dict[str, Case]) -> None:
    changed = {name for name, case in cases.items() if "moe_tp_gate_up_colwise" in case.plans.get("tp", {}).values()}
    assert changed == {name for name, case in cases.items() if case.rewritten}
    assert {"MixtralConfig", "LagunaConfig", "Qwen3OmniMoeTalkerTextConfig"} <= changed
    assert {"GptOssConfig", "InklingTextConfig", "NemotronHConfig"} <= cases.keys() - changed


@pytest.mark.parametrize(
    ("name", "mode", "outcome", "why"),
    [
        ("Qwen3VLMoeTextConfig", "tp", "passed", "k_norm"),
        ("Ernie4_5_VLMoeTextConfig", "ep", "passed", "sharded"),
        ("NemotronHConfig", "ep", "passed", "sharded"),
        ("InklingTextConfig", "tp", "refused", "gate and up lie one after the other"),
        ("Glm5NextTextConfig", "tp", "refused", "o_proj takes a sharded input, but nothing beside it"),
        ("Glm5NextTextConfig, no linear attention", "tp", "passed", "sharded"),
        ("ZayaConfig", "tp", "no plan", "no tp plan"),
        ("HYV4Config", "tp", "passed", "in float64; float32: "),  # its hyper-connections are computed in float32
        ("HYV4VLTextConfig", "ep", "passed", "sharded"),
    ],
)
def test_a_row(name: str, mode: Mode, outcome: str, why: str, cases: dict[str, Case], two_ranks: RankPool) -> None:
    for result in two_ranks.run(run_case, cases[name], mode):
        assert result.outcome == outcome, result.why
        assert why in result.why


def test_a_wrong_plan_is_found_wrong(cases: dict[str, Case], two_ranks: RankPool) -> None:
    """Let the plan of a class sum part of a gradient that is whole already."""
    case = cases["DeepseekV2Config"]
    latents = {"layers.*.self_attn.q_a_proj": "mla_kv_a_proj"}
    for result in two_ranks.run(run_unchecked, replace(case, plans={"tp": case.plans["tp"] | latents}), "tp"):
        assert result.outcome == "wrong", result.why
        assert "q_a_proj.weight" in result.why


def run_unchecked(case: Case, mode: Mode) -> Result:
    """Run a case as if nothing was known of layers that go together."""
    with patch("runtime.checks.plan.check_pairs"):
        return run_case(case, mode)
