"""Foreign tensors that hold several matrices: torch cuts each of them or all as one, and no shape tells which."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import Phi3Config, Qwen3NextConfig

from plans.errors import MismatchError, PlanError
from plans.placement import Packed, Shard
from runtime.checkpoint.external.plan import read_plan_file, resolve_external_plan
from runtime.checkpoint.external.sharding import resolve_shardings
from runtime.checkpoint.external.source import ExternalPlacement, ExternalSettings, FilePattern, UnevenPacked
from runtime.checkpoint.resharding.execute import execute_reshard
from runtime.checkpoint.resharding.output_files import ReshardTarget
from runtime.checkpoint.resharding.plan import plan_reshard
from runtime.checkpoint.verifying.verify import verify
from runtime.models.quantized import build_stored_model
from tests.external_files import DEEPSEEK, TP, Cut, grouped, packed, shard, state_of, write
from tests.runtime.checkpoint.hub.test_quantized import deepseek
from tests.tiny_models import DENSE, tiny_config, tiny_model

QKV = "model.layers.*.self_attn.qkv_proj.weight"
GATE_UP = "model.layers.*.mlp.gate_up_proj.weight"
AS_ONE: dict[str, Cut] = {r"(qkv|gate_up)_proj\.weight": shard(0), **TP}
EQUAL: dict[str, Cut] = {r"qkv_proj\.weight": packed(0, 3), r"gate_up_proj\.weight": packed(0), **TP}
UNEQUAL: dict[str, Cut] = {**EQUAL, r"qkv_proj\.weight": grouped(0, 32, 16, 16)}


def phi3(folder: Path, key_value_heads: int, heads: int = 4) -> Path:
    sizes = {"num_attention_heads": heads, "num_key_value_heads": key_value_heads, "intermediate_size": 48}
    tiny_model(Phi3Config(**{**DENSE, **sizes, "original_max_position_embeddings": 64})).save_pretrained(folder)
    return folder


def entries(hint: str) -> list[dict[str, Any]]:
    """Return the plans that a hint gives, in its order: each matrix cut, then all as one."""
    decoder, found = json.JSONDecoder(), []
    while "{" in hint:
        plan, stop = decoder.raw_decode(hint[hint.index("{") :])
        found.append(plan)
        hint = hint[hint.index("{") + stop :]
    return found


@pytest.mark.parametrize(("key_value_heads", "each"), [(4, EQUAL), (2, UNEQUAL)])
def test_fused_weights_are_read_by_what_the_user_says_alone(
    key_value_heads: int, each: dict[str, Cut], tmp_path: Path
) -> None:
    hub = phi3(tmp_path / "hub", key_value_heads)
    hints: set[str] = set()
    for number, cuts in enumerate((each, AS_ONE)):
        source = write(tmp_path / f"foreign{number}", hub, state_of(hub), cuts, tp=2)
        with pytest.raises(PlanError, match="their shapes do not tell") as refused:
            plan_reshard(
                source, target=ReshardTarget("hf"), external=ExternalSettings(FilePattern(DEEPSEEK), from_tp=2)
            )
        assert set(refused.value.data["keys"]) == {QKV, GATE_UP}
        hints.add(refused.value.hint)
        said = entries(refused.value.hint)
        assert len(said) == 2
        for other, plan in enumerate(said):
            (tmp_path / "plan.json").write_text(json.dumps(plan))
            foreign = ExternalSettings(FilePattern(DEEPSEEK), from_tp=2, plan=read_plan_file(tmp_path / "plan.json"))
            out = tmp_path / f"out{number}{other}"
            execute_reshard(plan_reshard(source, target=ReshardTarget("hf"), external=foreign), out)
            # No shape tells: by the other reading the same files become other weights, which is why it is asked.
            assert verify(out, hub).ok == (number == other)
    assert len(hints) == 1


@pytest.mark.parametrize(
    ("sizes", "what"),
    [((32, 16, 8), "sizes that sum to 56 do not split dim 0"), ((31, 17, 16), "do not divide by 2")],
)
def test_groups_that_are_not_the_tensors_are_refused(sizes: tuple[int, ...], what: str, tmp_path: Path) -> None:
    hub = phi3(tmp_path / "hub", 2)
    source = write(tmp_path / "foreign", hub, state_of(hub), UNEQUAL, tp=2)
    plan = {QKV: UnevenPacked(0, sizes), GATE_UP: Packed(0, 2)}
    with pytest.raises(MismatchError) as refused:
        plan_reshard(
            source, target=ReshardTarget("hf"), external=ExternalSettings(FilePattern(DEEPSEEK), from_tp=2, plan=plan)
        )
    assert what in refused.value.message


@pytest.mark.parametrize(
    ("heads", "said", "groups"),
    [
        ((8, 2), Packed(0, 3), [16, 16, 16]),
        ((8, 2), "packed_colwise", [24, 24]),
        ((8, 2), UnevenPacked(0, (24, 16, 8)), [24, 16, 8]),
        ((4, 2), Packed(0, 2), [32, 32]),
    ],
)
def test_groups_that_mix_the_matrices_are_refused_with_what_to_write(
    heads: tuple[int, int], said: ExternalPlacement | str, groups: list[int], tmp_path: Path
) -> None:
    """Every local shape is right: of 8 heads of queries, 2 of keys and 2 of values a third is no matrix."""
    hub = phi3(tmp_path / "hub", heads[1], heads[0])
    sizes = [heads[0] * 32 // heads[0], *[heads[1] * 32 // heads[0]] * 2]
    cuts = {**EQUAL, r"qkv_proj\.weight": grouped(0, *sizes)}
    source = write(tmp_path / "foreign", hub, state_of(hub), cuts, tp=2)
    foreign = ExternalSettings(FilePattern(DEEPSEEK), from_tp=2, plan={QKV: said, GATE_UP: Packed(0, 2)})
    with pytest.raises(PlanError) as refused:
        plan_reshard(source, target=ReshardTarget("hf"), external=foreign)
    assert f"model.layers.0.self_attn.qkv_proj.weight in groups of {groups} along dim 0, but" in refused.value.message
    assert f"matrices of {sizes}" in refused.value.message
    each, whole = entries(refused.value.hint)
    assert (each, whole) == ({QKV: {"packed": [0, sizes]}}, {QKV: {"shard": 0}})
    right = {**foreign.plan, QKV: UnevenPacked(0, tuple(sizes))}
    execute_reshard(
        plan_reshard(source, target=ReshardTarget("hf"), external=replace(foreign, plan=right)), tmp_path / "out"
    )
    assert verify(tmp_path / "out", hub).ok


def test_groups_within_a_matrix_are_the_users_to_say(tmp_path: Path) -> None:
    """Some stacks cut each head by itself: then no rank holds rows of another matrix than it must."""
    hub = phi3(tmp_path / "hub", 2)
    cuts = {**EQUAL, r"qkv_proj\.weight": packed(0, 8)}
    source = write(tmp_path / "foreign", hub, state_of(hub), cuts, tp=2)
    foreign = ExternalSettings(FilePattern(DEEPSEEK), from_tp=2, plan={QKV: Packed(0, 8), GATE_UP: Packed(0, 2)})
    execute_reshard(plan_reshard(source, target=ReshardTarget("hf"), external=foreign), tmp_path / "out")
    assert verify(tmp_path / "out", hub).ok


def test_a_fused_weight_that_looks_cut_may_be_cut_in_two_ways(tmp_path: Path) -> None:
    hub = phi3(tmp_path / "hub", 2)
    source = write(tmp_path / "foreign", hub, state_of(hub), UNEQUAL, tp=2)
    plan = {QKV: Shard(1), GATE_UP: Packed(0, 2)}
    with pytest.raises(MismatchError, match=r"it looks like Shard\(0\)") as refused:
        plan_reshard(
            source, target=ReshardTarget("hf"), external=ExternalSettings(FilePattern(DEEPSEEK), from_tp=2, plan=plan)
        )
    assert '"packed": [0, [SIZE' in refused.value.hint


@pytest.mark.parametrize(
    ("family", "sizes", "assumed"),
    [
        ("llama", {"from_tp": 2}, set()),
        ("qwen3_moe", {"from_tp": 2}, {"gate_up_proj"}),
        ("qwen3_moe", {"from_tp": 1}, set()),
        ("qwen3_moe", {"from_tp": 2, "from_ep": 2}, set()),
        ("qwen3_next", {"from_tp": 2}, {"in_proj_qkvz.weight", "in_proj_ba.weight", "gate_up_proj"}),
    ],
)
def test_what_only_the_plan_of_the_model_says_is_known(family: str, sizes: dict[str, int], assumed: set[str]) -> None:
    own = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
    config = Qwen3NextConfig(**{**DENSE, **own}) if family == "qwen3_next" else tiny_config(family)
    model = tiny_model(config)
    foreign = ExternalSettings(FilePattern(DEEPSEEK), **sizes)
    cuts = resolve_shardings(model, foreign, resolve_external_plan(model, foreign))
    found = {name for name, cut in cuts.items() if cut.evidence == "assumed"}
    ending = {next((one for one in assumed if name.endswith(one)), name) for name in found}
    assert ending == assumed


def test_groups_of_several_sizes_are_not_read_of_quantized_weights() -> None:
    plan = {"model.layers.*.mlp.experts.gate_up_proj": UnevenPacked(1, (16, 16))}
    with pytest.raises(PlanError, match=r"(?s)for quantized weights.*hint: save the whole model in hub form instead"):
        resolve_external_plan(
            build_stored_model(deepseek()), ExternalSettings(FilePattern(DEEPSEEK), from_tp=2, plan=plan)
        )
