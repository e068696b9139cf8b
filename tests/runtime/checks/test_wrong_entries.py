"""Entries that would change what a model computes: each is refused by name on every rank, before or while it runs."""

from __future__ import annotations

import re
from typing import Any

import pytest

from plans.errors import MigratorError
from tests.runtime.checks import wrong_entry_cases
from tests.runtime.rank_pool import RankPool

ATTENTION, MLP, EXPERTS = (f"model.layers.*.{name}" for name in ("self_attn", "mlp", "mlp.experts"))
GATHERED = dict.fromkeys((f"{MLP}.{name}_proj" for name in ("gate", "up", "down")), "colwise_gather_output")
SUMMED_BELOW = {f"{MLP}.down_proj": "local_params", f"{MLP}.down_proj.weight": "rowwise"}

SHARD = "it would use a shard as if it were the whole"
WHOLE = "would return the whole sequence"

REFUSED: list[tuple[str, str, dict[str, str | None], str]] = [
    ("qwen3_moe", "tp", {EXPERTS: "module_allgather"}, "experts: 'module_allgather' .* gate_up_proj is sharded"),
    ("qwen3_moe", "tp", {EXPERTS: "module_allgather_hidden_states"}, "gate_up_proj is sharded"),
    ("qwen3_moe", "tp", {EXPERTS: "mla_kv_a_proj"}, "which has no out_features"),
    ("qwen3_moe", "tp", {EXPERTS: "local_params"}, "nothing would sum it"),
    ("qwen2", "tp", SUMMED_BELOW, f"down_proj: 'local_params' .* {SHARD}"),
    ("llama", "tp", {**SUMMED_BELOW, MLP: "all_reduce"}, f"down_proj: 'local_params' .* {SHARD}"),
    ("qwen2", "tp", {f"{MLP}.down_proj": "all_reduce", f"{MLP}.down_proj.weight": "rowwise"}, SHARD),
    ("qwen2", "tp", {f"{MLP}.gate_proj": "local_params", f"{MLP}.gate_proj.weight": "colwise"}, SHARD),
    ("qwen2", "tp", {f"{ATTENTION}.q_proj": "local_params", f"{ATTENTION}.q_proj.weight": "colwise"}, SHARD),
    ("qwen2", "tp", {"model.embed_tokens": "local_params", "model.embed_tokens.weight": "embedding_rowwise"}, SHARD),
    ("qwen2", "tp", {"model.embed_tokens": "all_reduce", "model.embed_tokens.weight": "embedding_rowwise"}, SHARD),
    ("qwen2", "tp", {**GATHERED, MLP: "all_reduce"}, r"mlp\.gate_proj returns a whole output: it would count 2 times"),
    ("qwen2", "tp", {"model.layers.*.input_layernorm": "activation"}, "would return a slice of the sequence"),
    ("qwen3_moe", "tp", {f"{MLP}.gate": "activation"}, "would return a slice of the sequence"),
    ("qwen2", "sp", {f"{ATTENTION}.o_proj": "rowwise"}, f"o_proj {WHOLE}.*rowwise_reduce_scatter"),
    ("qwen2", "sp", {f"{MLP}.down_proj": "rowwise"}, f"down_proj {WHOLE}.*rowwise_reduce_scatter"),
    ("qwen2", "sp", dict.fromkeys(GATHERED), f"mlp {WHOLE}.*module_allgather_split"),
    ("qwen2", "sp", {"lm_head": "replicate"}, "lm_head would take its slice .*colwise_gather_output"),
    ("qwen2", "sp", {"lm_head": "module_allgather_split"}, "lm_head would take its slice"),
    ("qwen2", "sp", {"model.layers.*.input_layernorm": "activation_seq_dim_2"}, "input_layernorm .*'activation'"),
    ("qwen2", "tp", {"": "colwise"}, "the empty key names the model itself"),
    ("qwen2", "tp", {"model.layers.0.mlp.*.x": "colwise"}, "mixes a number and a wildcard"),
    ("qwen2", "tp", {3: "colwise"}, "both text, got 3: 'colwise'"),  # type: ignore[dict-item]
]


@pytest.mark.parametrize(("name", "mode", "changes", "message"), REFUSED, ids=lambda value: str(value)[:70])
def test_an_entry_that_would_change_the_result_is_refused(
    name: str, mode: Any, changes: dict[str, str | None], message: str, two_ranks: RankPool
) -> None:
    for refusal in two_ranks.run(wrong_entry_cases.read_refusal, name, mode, changes):
        assert re.search(message, refusal), refusal


@pytest.mark.parametrize(
    ("name", "mode", "changes"),
    [
        ("qwen2", "tp", {**SUMMED_BELOW, MLP: "all_reduce"}),
        ("qwen3_moe", "tp", {EXPERTS: "all_reduce", f"{MLP}.gate": "replicate"}),
        ("qwen2", "sp", {ATTENTION: "module_allgather_split", f"{ATTENTION}.o_proj": "rowwise"}),
    ],
    ids=lambda value: str(value)[:70],
)
def test_similar_entries_that_are_right_run(
    name: str, mode: Any, changes: dict[str, str | None], two_ranks: RankPool
) -> None:
    assert two_ranks.run(wrong_entry_cases.read_refusal, name, mode, changes, True) == ["accepted"] * 2


def test_an_output_that_is_not_a_tensor_is_refused_by_name(two_ranks: RankPool) -> None:
    changes = {ATTENTION: "all_reduce", f"{ATTENTION}.o_proj": "local_params", f"{ATTENTION}.o_proj.weight": "rowwise"}
    for refusal in two_ranks.run(wrong_entry_cases.read_refusal, "qwen2", "tp", changes, True):
        assert "self_attn: 'all_reduce' cannot hook" in refusal
        assert "returns a tuple, not one tensor" in refusal


def test_a_style_under_a_new_name_shards_and_runs(two_ranks: RankPool) -> None:
    shapes = []
    for logits, (_, worst), shape in two_ranks.run(wrong_entry_cases.own_style, True, True):
        assert max(logits, worst) < 1e-5
        shapes.append(shape)
    assert shapes == [(51, 32), (50, 32)]


def test_a_style_under_a_new_name_declares_which_shards_it_can_use(two_ranks: RankPool) -> None:
    with pytest.raises(MigratorError, match=rf"lm_head: 'mine' .* {SHARD}"):
        two_ranks.run(wrong_entry_cases.own_style, True, False)


def test_only_styles_that_can_run_are_suggested(two_ranks: RankPool) -> None:
    for refusal in two_ranks.run(wrong_entry_cases.read_refusal, "qwen2", "tp", {"lm_head": "colwize"}):
        _, _, suggested = refusal.partition("styles that can run: ")
        assert "colwise_gather_output" in suggested
        assert "loss_parallel" not in suggested
