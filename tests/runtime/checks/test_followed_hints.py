"""Hints of refused plans are followed to the end: the plan that they lead to computes what the unsharded model does."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.runtime.checks import wrong_entry_cases
from tests.runtime.rank_pool import RankPool

ATTENTION, MLP, EXPERTS = (f"model.layers.*.{name}" for name in ("self_attn", "mlp", "mlp.experts"))
CUT_NORMS = {f"{ATTENTION}.{name}_norm.weight": "colwise" for name in "qk"}
CUT_NORM = f"{ATTENTION}.q_norm.weight"
SUMMED_BELOW = {f"{MLP}.down_proj": "local_params", f"{MLP}.down_proj.weight": "rowwise"}
WHOLE_EXPERTS = {f"{EXPERTS}.{name}_proj": None for name in ("gate_up", "down")}

Changes = dict[str, str | None]
MADE_FOR: list[tuple[str, str, Changes, str]] = [
    ("olmoe", "tp", {**CUT_NORMS, f"{ATTENTION}.q_norm": "moe_experts_allreduce"}, "experts, but .*q_norm is a norm"),
    (
        "olmoe",
        "tp",
        {CUT_NORM: "colwise", f"{ATTENTION}.q_norm": "all_reduce"},
        "it would use a shard as if it were the whole",
    ),
    ("llama", "tp", {**SUMMED_BELOW, MLP: "moe_experts_allreduce"}, "experts, but .*mlp is a module, LlamaMLP"),
    ("llama", "tp", {MLP: "moe_tp_experts"}, "experts, but .*mlp is a module, LlamaMLP"),
    ("llama", "tp", {f"{ATTENTION}.q_proj": "grouped_gemm"}, "experts, but .*q_proj is a Linear layer"),
    ("qwen2", "tp", {"lm_head.weight": "moe_tp_gate_up_colwise"}, "experts, but lm_head is a Linear layer"),
    (
        "mixtral",
        "tp",
        {"model.embed_tokens": "moe_experts_allreduce"},
        "experts, but model.embed_tokens is an embedding",
    ),
    ("qwen3_moe", "tp", {f"{ATTENTION}.q_proj": "ep_router"}, "routers, but .*q_proj is a Linear layer"),
    ("qwen3_moe", "tp", {"model.norm": "ep_router"}, "routers, but model.norm is a norm"),
    ("qwen2", "sp", {f"{ATTENTION}.q_proj": "sequence_parallel"}, "norms, but .*q_proj is a Linear layer"),
    ("qwen2", "tp", {f"{ATTENTION}.q_proj": "embedding_rowwise"}, "embeddings, but .*q_proj is a Linear layer"),
    ("qwen2", "tp", {"model.norm": "rowwise"}, "which has no in_features"),
]

NAMED: list[tuple[str, str, Changes]] = [
    ("olmoe", "tp", CUT_NORMS),
    ("olmoe", "tp", {**CUT_NORMS, **dict.fromkeys((f"{ATTENTION}.{name}_norm" for name in "qk"), "local_params")}),
    ("mixtral", "tp", {EXPERTS: None}),
    ("mixtral", "tp", WHOLE_EXPERTS),
    ("mixtral", "tp", {EXPERTS: "local_params"}),
    ("mixtral", "tp", {f"{MLP}.gate": "ep_router"}),
    ("mixtral", "ep", {EXPERTS: None}),
    ("mixtral", "ep", {EXPERTS: "moe_experts_allreduce"}),
    ("mixtral", "ep", {EXPERTS: "all_reduce"}),
    ("mixtral", "ep", {f"{MLP}.gate": "ep_router"}),
    ("mixtral", "ep", {f"{MLP}.gate": "ep_router", EXPERTS: "all_reduce"}),
    ("mixtral", "ep", WHOLE_EXPERTS),
    ("qwen2", "tp", {f"{ATTENTION}.q_proj": None, f"{ATTENTION}.q_proj.weight": "colwise"}),
    ("qwen2", "tp", {"model.embed_tokens": None, "model.embed_tokens.weight": "embedding_rowwise"}),
    ("qwen2", "tp", {f"{ATTENTION}.k_proj": None}),
    ("qwen2", "tp", {f"{ATTENTION}.o_proj": None}),
    ("qwen2", "tp", dict.fromkeys(f"{MLP}.{name}_proj" for name in ("gate", "up"))),
    ("qwen2", "tp", {"model.norm": "replicated_with_grad_allreduce"}),
    ("deepseek_v2", "tp", {f"{ATTENTION}.kv_a_proj_with_mqa": None}),
    ("deepseek_v2", "tp", {f"{ATTENTION}.q_a_proj": "mla_kv_a_proj"}),
    ("qwen3_moe", "tp", {f"{ATTENTION}.q_norm": "replicate"}),
    ("qwen2", "sp", {f"{ATTENTION}.o_proj": "rowwise"}),
    ("qwen2", "sp", dict.fromkeys(f"{MLP}.{name}_proj" for name in ("gate", "up", "down"))),
    ("qwen2", "sp", {"lm_head": "replicate"}),
    ("qwen2", "sp", {"model.embed_tokens": "embedding_rowwise"}),
    ("qwen2", "sp", {"model.layers.*.input_layernorm": None}),
]


@pytest.mark.parametrize(("name", "mode", "changes", "message"), MADE_FOR, ids=lambda value: str(value)[:60])
def test_styles_are_refused_on_modules_that_they_were_not_made_for(
    name: str, mode: Any, changes: Changes, message: str, two_ranks: RankPool
) -> None:
    for refusal in two_ranks.run(wrong_entry_cases.read_refusal, name, mode, changes):
        assert_matches(message, refusal)
    for _, logits, gradient in two_ranks.run(wrong_entry_cases.follow_hints, name, mode, changes):
        assert max(logits, gradient) < 1e-5


@pytest.mark.parametrize("alternative", [0, pytest.param(1, marks=pytest.mark.full)])
@pytest.mark.parametrize(("name", "mode", "changes"), NAMED, ids=lambda value: str(value)[:60])
def test_what_a_hint_names_computes_the_same(
    name: str, mode: Any, changes: Changes, alternative: int, two_ranks: RankPool
) -> None:
    for hints, logits, gradient in two_ranks.run(wrong_entry_cases.follow_hints, name, mode, changes, alternative):
        assert hints
        assert max(logits, gradient) < 1e-5, hints


def assert_matches(pattern: str, text: str) -> None:
    assert re.search(pattern, text), text
