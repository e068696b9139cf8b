"""Parameters that stay in float32 under FSDP, which gathers one dtype at a time: groups of their own, as upstream."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.distributed import DistributedConfig

from plans.errors import IndivisibleError, UsageError
from plans.mesh import Mesh
from runtime import parallelize, run_on_ranks
from runtime.models.model import meta_model
from tests.runtime.parallel import fsdp_cases
from tests.runtime.rank_pool import RankPool
from tests.tiny_models import DENSE

HalfFolder = Callable[[str, str], Path]

UNIFORM = [("deepseek_v3", "DeepseekV3Config"), ("glm4_moe", "Glm4MoeConfig"), ("nemotron_h", "NemotronHConfig")]
"""Models whose router is kept in float32 since transformers 5.24."""
MIXED = [
    ("flint", "FlintConfig", "self_attn.sinks"),
    ("kimi_linear", "KimiLinearConfig", "self_attn.forget_gate.dt_bias"),
]
"""Models with a parameter that is kept in float32 and cannot be gathered without others of its module."""


@pytest.fixture(scope="module")
def half_folder(tmp_path_factory: pytest.TempPathFactory) -> HalfFolder:
    folders: dict[str, Path] = {}

    def saved(family: str, class_name: str) -> Path:
        if class_name not in folders:
            folders[class_name] = tmp_path_factory.mktemp(family)
            fsdp_cases.save_half(family, class_name, folders[class_name])
        return folders[class_name]

    return saved


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("family", "class_name"), [*UNIFORM, ("afmoe", "AfmoeConfig")])
def test_a_step_in_two_dtypes_equals_the_unsharded_one(
    family: str, class_name: str, dtype: torch.dtype | None, two_ranks: RankPool, half_folder: HalfFolder
) -> None:
    folder = half_folder(family, class_name)
    declared = fsdp_cases.load_whole(folder)._keep_in_fp32_modules_strict
    for kept, other, different in two_ranks.run(fsdp_cases.compare_with_whole, folder, dtype):
        assert other == []
        assert different == []
        # AFMoE's are frozen, and FSDP needs one dtype for those that are trained only.
        assert bool(kept) == bool({"gate.weight", "expert_bias"} & set(declared))


@pytest.mark.parametrize(("family", "class_name"), UNIFORM)
def test_the_groups_in_float32_are_those_of_transformers(
    family: str, class_name: str, two_ranks: RankPool, half_folder: HalfFolder
) -> None:
    folder = half_folder(family, class_name)
    model = meta_model(fsdp_cases.read_config(folder)).to(torch.bfloat16)
    _, _, plan = model._resolve_parallel_plans(DistributedConfig(fsdp_size=2))
    theirs = {name for name in plan if name.endswith(".gate")}
    assert bool(theirs) == ("gate.weight" in model._keep_in_fp32_modules_strict)
    for groups in two_ranks.run(fsdp_cases.find_groups, folder):
        assert {name for name in groups if name.endswith(".gate")} == theirs


@pytest.mark.parametrize(("family", "class_name", "name"), MIXED)
def test_two_dtypes_that_are_gathered_together_are_refused_by_name(
    family: str, class_name: str, name: str, two_ranks: RankPool, half_folder: HalfFolder
) -> None:
    folder = half_folder(family, class_name)
    skip_unless_kept(folder, name)
    with pytest.raises(UsageError, match=r"FSDP gathers .* together and needs one dtype for both") as caught:
        two_ranks.run(fsdp_cases.compare_with_whole, folder, None)
    assert name in caught.value.message
    assert caught.value.hint == "cast both while loading, with dtype=torch.bfloat16"


@pytest.mark.parametrize(("family", "class_name", "name"), MIXED)
def test_they_are_cast_as_the_hint_says(
    family: str, class_name: str, name: str, two_ranks: RankPool, half_folder: HalfFolder
) -> None:
    folder = half_folder(family, class_name)
    skip_unless_kept(folder, name)
    for kept, other, _ in two_ranks.run(fsdp_cases.compare_with_whole, folder, torch.bfloat16):
        assert {found.partition(".layers.")[2].partition(".")[2] for found in other} == {name}
        assert not set(kept) & set(other)


def test_a_part_for_every_rank_is_needed_where_fsdp_reduces_gradients() -> None:
    """Five rows over four ranks are two for each, and none for the last."""
    refused = "model.embed_tokens.weight: tp=4 leaves the last rank nothing of 5 in dim 0, and FSDP cannot reduce"
    for mesh in (Mesh(tp=4, fsdp=2), Mesh(tp=4, replicate=2)):
        with pytest.raises(IndivisibleError, match=refused) as caught:
            run_on_ranks(lambda mesh=mesh: shard_five_rows(mesh), mesh)
        assert caught.value.hint == "sizes that work: 1, 2, 3"
    assert run_on_ranks(lambda: shard_five_rows(Mesh(tp=4)), 4) == [2, 2, 1, 0]


def shard_five_rows(mesh: Mesh) -> int:
    torch.manual_seed(0)
    model: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**DENSE, "vocab_size": 5}))
    parallelize(model, mesh)
    return len(model.lm_head.weight.to_local())


def skip_unless_kept(folder: Path, name: str) -> None:
    if name.rpartition(".")[2] not in fsdp_cases.load_whole(folder)._keep_in_fp32_modules_strict:
        pytest.skip("this release of transformers does not keep it in float32")


@pytest.mark.parametrize("mesh", [Mesh(fsdp=2), Mesh(tp=2, fsdp=2), Mesh(tp=2, ep=2, fsdp=2)], ids=str)
@pytest.mark.filterwarnings("ignore:.torch.distributed:FutureWarning")
def test_what_is_gathered_at_once_is_no_more_than_is_counted(mesh: Mesh) -> None:
    for peak, counted, alone in run_on_ranks(lambda: fsdp_cases.watch_gathering("qwen3_moe", mesh), mesh):
        assert alone < peak <= counted
