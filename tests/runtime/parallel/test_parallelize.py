"""Real models made parallel: local tensors as the plan and DTensor say, gradients as the unsharded model's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from plans.errors import PlanError, UsageError
from tests.runtime import rank_cases
from tests.runtime.rank_pool import RankPool
from tests.runtime.styles import style_cases
from tests.tiny_models import MODELS

HubFolder = Callable[[str], Path]
RankFolder = Callable[[str, int], Path]


@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_every_parameter_equal_the_unsharded_models(
    name: str, two_ranks: RankPool, hub_folder: HubFolder, rank_folder: RankFolder
) -> None:
    for errors in two_ranks.run(rank_cases.gradient_errors, hub_folder(name), rank_folder(name, 2)):
        assert len(errors) > 15
        worst = max(errors, key=errors.__getitem__)
        assert errors[worst] < 1e-5, (worst, errors[worst])


@pytest.mark.parametrize("name", MODELS)
def test_local_tensors_are_what_dtensor_holds(
    name: str, two_ranks: RankPool, hub_folder: HubFolder, rank_folder: RankFolder
) -> None:
    for found in two_ranks.run(rank_cases.local_tensors, hub_folder(name), rank_folder(name, 2)):
        assert [parameter for parameter, (_, equal, _) in found.items() if not equal] == []


def test_experts_hold_half_of_each_expert_and_the_odd_vocabulary_is_cut_unevenly(
    two_ranks: RankPool, hub_folder: HubFolder, rank_folder: RankFolder
) -> None:
    first, second = two_ranks.run(rank_cases.local_tensors, hub_folder("qwen3_moe"), rank_folder("qwen3_moe", 2))
    for found in (first, second):
        assert found["model.layers.0.mlp.experts.gate_up_proj"][0] == [8, 16, 32]
        assert found["model.layers.0.mlp.experts.down_proj"][0] == [8, 32, 8]
        assert found["model.layers.0.mlp.gate.weight"][0] == [8, 32]
        assert found["model.layers.1.mlp.gate_proj.weight"][0] == [26, 32]
    assert first["lm_head.weight"][0] == [51, 32]
    assert second["lm_head.weight"][0] == [50, 32]


def test_tied_weights_are_sharded_once_and_stay_tied(
    two_ranks: RankPool, hub_folder: HubFolder, rank_folder: RankFolder
) -> None:
    for found in two_ranks.run(rank_cases.local_tensors, hub_folder("llama"), rank_folder("llama", 2)):
        assert [name for name, (_, _, tied) in found.items() if tied] == ["lm_head.weight"]


def test_a_tied_name_listed_before_its_target_stays_tied(two_ranks: RankPool) -> None:
    assert two_ranks.run(style_cases.tied_before_its_target) == [(True, "Shard(0)")] * 2


def test_a_parallel_model_is_not_made_parallel_again(two_ranks: RankPool, rank_folder: RankFolder) -> None:
    with pytest.raises(UsageError, match="LlamaForCausalLM is parallel already"):
        two_ranks.run(rank_cases.parallelize_twice, rank_folder("llama", 2))


def test_a_plan_for_another_mesh_is_refused(two_ranks: RankPool, hub_folder: HubFolder) -> None:
    with pytest.raises(UsageError, match="plan is for tp=4, ep=1, fsdp=1, the device mesh is tp=2, ep=1, fsdp=1"):
        two_ranks.run(rank_cases.parallelize_for, hub_folder("llama"), 4)


def test_a_plan_of_another_model_is_refused(two_ranks: RankPool, hub_folder: HubFolder) -> None:
    with pytest.raises(PlanError, match=r"resolved on another model: model\.layers\.0\.mlp"):
        two_ranks.run(rank_cases.parallelize_other, hub_folder("mixtral"), hub_folder("olmoe"))


def test_a_mesh_of_another_size_than_the_process_group_is_refused(two_ranks: RankPool) -> None:
    with pytest.raises(UsageError, match="the mesh has 3 ranks, but the process group has 2"):
        two_ranks.run(rank_cases.mesh_of, 3)
