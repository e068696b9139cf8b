"""Tiny configs of real families, sparse and dense layers mixed, sizes uneven where they need not divide."""

from __future__ import annotations

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
    "llama": ("LlamaConfig", DENSE | {"tie_word_embeddings": True, "mlp_bias": True}),
    "qwen2": ("Qwen2Config", DENSE),
}
