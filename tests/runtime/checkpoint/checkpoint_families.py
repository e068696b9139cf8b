"""Tiny configs of real families: model type → config class and sizes.

`hrm_text` is stored in chunks, `llama` with tied embeddings, the others with one tensor per expert. `olmoe` has a
vocabulary so small that one rank of four holds nothing of it.
"""

from __future__ import annotations

_DENSE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 131,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 64,
}
_LATENT = {
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
}
_ROUTED = {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_NUMBERED = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_GROUPED = {"head_dim": 16, "first_k_dense_replace": 1, "n_shared_experts": 1, "n_group": 1}

FAMILIES: dict[str, tuple[str, dict[str, object]]] = {
    "qwen3_moe": ("Qwen3MoeConfig", _DENSE | _NUMBERED | {"head_dim": 16}),
    "mixtral": ("MixtralConfig", _DENSE | {"num_local_experts": 4}),
    "deepseek_v3": ("DeepseekV3Config", _DENSE | _LATENT | _ROUTED),
    "glm4_moe": ("Glm4MoeConfig", _DENSE | _ROUTED | _GROUPED),
    "olmoe": ("OlmoeConfig", _DENSE | {"num_experts": 8, "num_experts_per_tok": 2, "vocab_size": 5}),
    "llama": ("LlamaConfig", _DENSE | {"tie_word_embeddings": True}),
    "hrm_text": ("HrmTextConfig", _DENSE),
}
