"""Tiny models whose plans tests change, and the functions that tests run on ranks with them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch.distributed.tensor import DTensor

from plans.errors import PlanError
from plans.mesh import Mesh
from runtime import Plan, parallelize, verify_sharding
from runtime.styles.placements import cut_local_shard, get_placement
from tests.tiny_models import DENSE, MODELS, with_noise

_GROUPED = DENSE | {"num_hidden_layers": 2, "num_key_value_heads": 2, "num_attention_heads": 4}
_FEW = {"num_hidden_layers": 2}
_LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}

CONFIGS: Mapping[str, tuple[str, Mapping[str, object]]] = {
    "llama": ("Llama", _GROUPED),
    "one_kv_head": ("Llama", _GROUPED | {"num_key_value_heads": 1}),
    "all_heads_keyed": ("Llama", DENSE | _FEW),
    "phi3": ("Phi3", _GROUPED),
    "qwen3": ("Qwen3", _GROUPED | {"head_dim": 8}),
    "square_heads": ("Qwen3", _GROUPED | {"head_dim": 32}),
    "cohere": ("Cohere", _GROUPED | {"use_qk_norm": True}),
    "doge": ("Doge", _GROUPED),
    "apertus": ("Apertus", _GROUPED),
    "granite_swa": ("GraniteSWA", _GROUPED | {"head_dim": 8}),
    "deepseek_v2": ("DeepseekV2", {**MODELS["deepseek_v2"][1], **_FEW}),
    "deepseek_v3": ("DeepseekV3", {**MODELS["deepseek_v3"][1], **_FEW}),
    "equal_latents": ("DeepseekV2", {**MODELS["deepseek_v2"][1], **_FEW, "kv_lora_rank": 8, "q_lora_rank": 12}),
    "mixtral": ("Mixtral", _GROUPED | {"num_local_experts": 4}),
    "bert": ("Bert", DENSE | _FEW | {"is_decoder": False}),
    "opt": ("OPT", {"hidden_size": 32, "ffn_dim": 52, "word_embed_proj_dim": 32, "num_attention_heads": 4} | _FEW),
    "gptj": ("GPTJ", {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4}),
    "gpt_neo": ("GPTNeo", {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global"], 2]]}),
    "xglm": ("XGLM", {"d_model": 32, "ffn_dim": 52, "num_layers": 2, "attention_heads": 4, "vocab_size": 101}),
    "bloom": ("Bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "codegen": ("CodeGen", {"n_embd": 64, "n_head": 8, "n_layer": 2, "rotary_dim": 4}),
    "gpt_neox": ("GPTNeoX", DENSE | _FEW),
    "qwen3_next": ("Qwen3Next", {**_GROUPED, **_LINEAR, "num_experts": 4, "head_dim": 8, "mlp_only_layers": [0, 1]}),
    "falcon": ("Falcon", DENSE | _FEW | {"multi_query": False}),
}
"""The prefix of a model's classes and its sizes, by a name for tests."""

_LAYER = "bert.encoder.layer.*"
BERT = {
    **{f"{_LAYER}.attention.self.{name}": "colwise" for name in ("query", "key", "value")},
    f"{_LAYER}.attention.output.dense": "rowwise",
    f"{_LAYER}.intermediate.dense": "colwise",
    f"{_LAYER}.output.dense": "rowwise",
}
"""A plan for a model that has none, whose paired layers stand in modules side by side."""

_HEAD_SUFFIXES = {"Bert": "ForMaskedLM"}


def build_config(name: str) -> Any:
    prefix, sizes = CONFIGS[name]
    config = getattr(transformers, f"{prefix}Config")(**sizes)
    config.architectures = [f"{prefix}{_HEAD_SUFFIXES.get(prefix, 'ForCausalLM')}"]
    config._attn_implementation = "eager"
    return config


def build_model(name: str) -> Any:
    torch.manual_seed(0)
    config = build_config(name)
    return with_noise(getattr(transformers, config.architectures[0])(config)).eval()


def change_entries(plan: Mapping[str, str], changes: Mapping[str, str | None]) -> dict[str, str]:
    """Return a plan with entries replaced or added, or removed where a change is None."""
    merged = {**plan, **changes}
    return {key: style for key, style in merged.items() if style is not None}


def read_released_plan(model: Any) -> Mapping[str, str]:
    """Return the plan that a model's classes declare, empty for those without one."""
    return Plan.from_model(model, "tp").entries if model.tp_plan else {}


def refuse_before_sharding(name: str, changes: dict[str, str | None]) -> str:
    """Return the message with which `parallelize` refuses a plan, having checked that it left the model unchanged."""
    model = build_model(name)
    plan = change_entries(read_released_plan(model), changes)
    try:
        parallelize(model, Mesh(tp=dist.get_world_size()), plan)
    except PlanError as error:
        assert not any(isinstance(parameter, DTensor) for parameter in model.parameters())
        return error.message
    raise AssertionError("nothing was refused")


def compute_errors(name: str, changes: dict[str, str | None]) -> dict[str, float]:
    """Run a model by its changed plan; return the errors of logits and gradients, relative to the unsharded model's."""
    reference = build_model(name)
    shard = copy.deepcopy(reference)
    mesh = Mesh(tp=dist.get_world_size())
    resolved = parallelize(shard, mesh, change_entries(read_released_plan(shard), changes))
    verify_sharding(shard, resolved)
    tokens = torch.randint(3, 99, (2, 16), generator=torch.Generator().manual_seed(1))
    logits = []
    for one in (reference, shard):
        logits.append(one(input_ids=tokens, use_cache=False).logits)
        (logits[-1] * torch.linspace(-1, 1, logits[-1].numel()).view_as(logits[-1])).mean().backward()
    errors = {"logits": _relative(logits[1], logits[0])}
    for key, parameter in shard.named_parameters():
        whole = reference.get_parameter(key).grad
        own = parameter.grad.to_local() if isinstance(parameter, DTensor) else parameter.grad
        placement = get_placement(parameter)
        assert placement is not None
        # A key's bias adds the same to the scores of all keys and cancels out: its gradient is noise, compared with 1.
        scale = torch.ones(()) if key.endswith("key.bias") else whole
        errors[key] = _relative(own, cut_local_shard(whole, placement, dist.get_world_size(), dist.get_rank()), scale)
    return errors


def _relative(value: torch.Tensor, expected: torch.Tensor, scale: torch.Tensor | None = None) -> float:
    largest = float((expected if scale is None else scale).detach().abs().max())
    return float((value.detach() - expected.detach()).abs().max()) / largest
