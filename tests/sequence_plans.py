"""Forks of five families whose configs carry sequence parallel plans, which no released config does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from tests.forks import fork_model

__all__ = ["SEQUENCE_PLANS", "fork_with_sequence_plan"]

_STREAM = {
    "embed_tokens": "vocab_reduce_scatter",
    "layers.*.input_layernorm": "activation",
    "layers.*.post_attention_layernorm": "activation",
    "norm": "activation",
    "layers.*.mlp.experts.gate_up_proj": "moe_tp_gate_up_colwise",
    "layers.*.mlp.experts.down_proj": "moe_tp_down_rowwise",
    "layers.*.mlp.experts": "moe_tp_experts",
}
_ATTENTION = {
    "layers.*.self_attn": "module_allgather",
    **dict.fromkeys((f"layers.*.self_attn.{name}_proj" for name in "qkv"), "colwise"),
    "layers.*.self_attn.o_proj": "rowwise_reduce_scatter",
}
_HEAD_NORMS = dict.fromkeys((f"layers.*.self_attn.{name}_norm" for name in "qk"), "replicated_with_grad_allreduce")
_SPARSE = {"layers.*.mlp": "module_allgather_split"}
_WHOLE_ATTENTION = {"layers.*.self_attn": "module_allgather_split"}
# The first layer of these is dense.
_SHARED = {
    **{f"layers.{number}.mlp": "module_allgather_split" for number in (1, 2, 3)},
    "layers.0.mlp": "module_allgather",
    **dict.fromkeys((f"layers.*.mlp.{name}_proj" for name in ("gate", "up")), "colwise"),
    "layers.*.mlp.down_proj": "rowwise_reduce_scatter",
    **dict.fromkeys((f"layers.*.mlp.shared_experts.{name}_proj" for name in ("gate", "up")), "colwise"),
    "layers.*.mlp.shared_experts.down_proj": "rowwise",
}

SEQUENCE_PLANS: Mapping[str, Mapping[str, str]] = {
    "deepseek_v3": {**_STREAM, **_WHOLE_ATTENTION, **_SHARED},
    "glm4_moe": {**_STREAM, **_ATTENTION, **_SHARED},
    "mixtral": {**_STREAM, **_ATTENTION, **_SPARSE},
    "olmoe": {**_STREAM, **_WHOLE_ATTENTION, **_SPARSE},
    "qwen3_moe": {**_STREAM, **_ATTENTION, **_HEAD_NORMS, **_SPARSE},
}
"""The plan of each family's config; the head's entry is that of its model's class."""

_EP_PLAN = "    base_model_ep_plan = {"
_HEAD = '    _tp_plan = {"lm_head": "colwise_gather_output"}\n'


def fork_with_sequence_plan(folder: Path, family: str, plan: Mapping[str, str], name: str) -> Path:
    """Copy a family into a package of its own with a sequence parallel plan, and return its configuration file."""
    literal = json.dumps(dict(plan), indent=8).replace("\n}", "\n    }")
    edits = {_EP_PLAN: f"    base_model_sp_plan = {literal}\n{_EP_PLAN}", _HEAD: _HEAD + _HEAD.replace("_tp", "_sp")}
    return fork_model(folder, family, edits, name=name)
