"""Tiny configs of real families, sparse and dense layers mixed, sizes uneven where they need not divide."""

from __future__ import annotations

from typing import Any

import torch
import transformers

DENSE = {
    "hidden_size": 32,
    "intermediate_size": 52,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 101,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 64,
    # Large weights, so that a wrong one shows in the logits.
    "initializer_range": 0.2,
}
_LATENT = {
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "n_group": 2,
    "topk_group": 1,
}
_SHARED = {"first_k_dense_replace": 1, "n_shared_experts": 1}
_ROUTED = {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_NUMBERED = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

MODELS: dict[str, tuple[str, dict[str, object]]] = {
    "qwen3_moe": ("Qwen3MoeConfig", DENSE | _NUMBERED | {"head_dim": 8, "mlp_only_layers": [1]}),
    "mixtral": ("MixtralConfig", DENSE | {"num_local_experts": 4}),
    "deepseek_v3": ("DeepseekV3Config", DENSE | _LATENT | _ROUTED | _SHARED),
    "deepseek_v2": ("DeepseekV2Config", DENSE | _LATENT | _ROUTED | _SHARED),
    "glm4_moe": ("Glm4MoeConfig", DENSE | _ROUTED | _SHARED | {"head_dim": 8, "n_group": 1}),
    "olmoe": ("OlmoeConfig", DENSE | {"num_experts": 8, "num_experts_per_tok": 2}),
    "hy_v3": ("HYV3Config", DENSE | _NUMBERED | {"head_dim": 8}),
    "laguna": (
        "LagunaConfig",
        DENSE
        | _NUMBERED
        | {
            "head_dim": 8,
            "shared_expert_intermediate_size": 20,
            "num_attention_heads_per_layer": [4, 8, 4],
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            "sliding_window": 8,
        },
    ),
    "mellum": (
        "MellumConfig",
        DENSE
        | _NUMBERED
        | {
            "head_dim": 8,
            "mlp_layer_types": ["sparse", "dense", "sparse"],
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            "sliding_window": 8,
        },
    ),
    "llama": ("LlamaConfig", DENSE | {"tie_word_embeddings": True, "mlp_bias": True}),
    "qwen2": ("Qwen2Config", DENSE),
}

# gpt_oss: no TP plan for its layers; biases, sinks, and gate and up interleaved.
ODD_MODELS: dict[str, tuple[str, dict[str, object]]] = {
    "gpt_oss": (
        "GptOssConfig",
        DENSE
        | {
            "head_dim": 8,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "sliding_window": 8,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    "six_experts": ("MixtralConfig", DENSE | {"num_local_experts": 6}),
}


def tiny_config(name: str) -> Any:
    """Return a tiny model's config."""
    config, sizes = (MODELS | ODD_MODELS)[name]
    return getattr(transformers, config)(**sizes)


def tiny_model(config: Any, seed: int = 0) -> Any:
    """Return a config's causal language model with random weights, the same for the same seed."""
    torch.manual_seed(seed)
    return with_noise(transformers.AutoModelForCausalLM.from_config(config))


def with_noise(model: Any) -> Any:
    """Move every parameter: biases and norms begin as zeros and ones, with which many a mistake would not show."""
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model
