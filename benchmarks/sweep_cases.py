"""The cases of the sweep, and tiny sizes for them: one table for all, and what single classes need on top."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["SHRUNK", "SIZES", "TAKE_EMBEDDINGS", "VARIANTS", "Case"]


@dataclass(frozen=True)
class Case:
    """One config class with its plans.

    Args:
        family: its models folder.
        class_name: the config class.
        plans: `tp` and `ep`, where it has one, each from key to style, keys as the class writes them.
        rewritten: whether the rewrite changed its TP plan.
        variant: what is different from the class's first row; empty for that.
    """

    family: str
    class_name: str
    plans: dict[str, dict[str, str]]
    rewritten: bool
    variant: str = ""

    @property
    def name(self) -> str:
        """The row's name in the table."""
        return f"{self.class_name}, {self.variant}" if self.variant else self.class_name


SHRUNK: Mapping[str, int] = {
    "adapter_in_dim": 32,
    "adapter_out_dim": 32,
    "conv_kernel": 2,
    "dense_intermediate_size": 52,
    "expert_ffn_hidden_size": 16,
    "ffn_hidden_size": 52,
    "first_k_dense_replace": 1,
    "gated_norm_rank": 8,
    "hc_mult": 2,
    "head_dim": 8,
    "hidden_size": 32,
    "hidden_size_per_layer_input": 8,
    "index_block_size": 8,
    "index_head_dim": 8,
    "index_n_heads": 4,
    "index_topk": 8,
    "index_topk_blocks": 2,
    "intermediate_size": 52,
    "intermediate_size_mlp": 52,
    "kv_channels": 8,
    "kv_lora_rank": 16,
    "linear_head_dim": 8,
    "linear_key_head_dim": 8,
    "linear_num_heads": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_value_head_dim": 8,
    "mamba_chunk_size": 8,
    "mamba_d_state": 8,
    "mamba_head_dim": 8,
    "mamba_n_heads": 8,
    "mamba_num_heads": 8,
    "max_position_embeddings": 64,
    "moe_hidden_size": 16,
    "moe_intermediate_size": 16,
    "moe_k": 2,
    "moe_num_experts": 8,
    "moe_shared_expert_intermediate_size": 16,
    "moe_topk": 2,
    "n_group": 2,
    "n_groups": 2,
    "n_routed_experts": 8,
    "num_attention_heads": 4,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "num_layers": 2,
    "num_local_experts": 8,
    "num_sliding_attention_heads": 4,
    "o_groups": 2,
    "o_lora_rank": 8,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "rotary_dim": 4,
    "router_hidden_size": 16,
    "share_expert_dim": 16,
    "shared_expert_intermediate_size": 16,
    "shared_experts_intermediate_size": 16,
    "shared_intermediate_size": 16,
    "sliding_window": 8,
    "sliding_window_size": 8,
    "ssm_state_size": 8,
    "swa_head_dim": 8,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "topk_group": 1,
    "v_head_dim": 8,
    "vocab_size": 101,
    "vocab_size_per_layer_input": 101,
    "zero_expert_num": 2,
}
"""Upper bounds by field: a class that has the field with a larger default gets this value."""

_GEMMA_EXPERTS: Mapping[str, object] = {
    "num_experts": 8,
    "top_k_experts": 2,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 6,  # the last of six layers attends to the whole sequence, the others to a window
}
_VISION_AND_TEXT: Mapping[str, object] = {
    "moe_intermediate_size": [16, 8],
    "num_hidden_layers": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
}

SIZES: Mapping[str, Mapping[str, object]] = {
    "DeepseekOcr2TextConfig": {"num_experts_per_tok": 2, "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]},
    "DeepseekV2Config": {"num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "DiffusionGemmaTextConfig": _GEMMA_EXPERTS,
    "Dots1Config": {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "Dots3NoteVisionConfig": {"num_experts_per_tok": 2, "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]},
    "Ernie4_5_VLMoeTextConfig": _VISION_AND_TEXT,
    "Ernie4_5_VL_MoeTextConfig": _VISION_AND_TEXT,
    "Gemma4TextConfig": {**_GEMMA_EXPERTS, "enable_moe_block": True},
    "FlexOlmoConfig": {"num_experts": 8},
    "Glm4vMoeTextConfig": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [1, 1, 2],
            "partial_rotary_factor": 1.0,
        }
    },
    "Glm5NextTextConfig": {"index_kpool": 4},
    "HYV4VLTextConfig": {
        "qk_rope_head_dim": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
    },
    "HunYuanMoEV1Config": {
        "num_experts": 8,
        "moe_topk": 2,
        "head_dim": 8,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 1.0, "alpha": 2.0},
    },
    "JambaConfig": {"attn_layer_period": 4, "attn_layer_offset": 2, "use_mamba_kernels": False},
    "Lfm2MoeConfig": {
        "layer_types": ["conv", "full_attention", "conv", "full_attention"],
        "num_dense_layers": 1,
    },
    "LongcatFlashConfig": {"head_dim": 4},
    "NemotronHConfig": {"use_mamba_kernels": False},
    "Qwen3OmniMoeTalkerTextConfig": {"shared_expert_intermediate_size": 16},
    "Qwen4ExpTextConfig": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
        "hc_lowrank": 8,
    },
    "Step3p7TextConfig": {"sliding_window": 8, "num_sliding_attention_heads": 4},
    "UnlimitedOcrTextConfig": {"num_key_value_heads": 4},
}
"""By config class: what its tiny config needs besides."""

VARIANTS: Mapping[str, Mapping[str, Mapping[str, object]]] = {
    "Glm4MoeConfig": {"with q and k norms": {"use_qk_norm": True}},
    "Glm5NextTextConfig": {
        "no linear attention": {"layer_types": ["full_attention"] * 4, "indexer_types": ["full"] * 4},
    },
}
"""Other shapes of a class worth a row of their own, by what is different about them."""

TAKE_EMBEDDINGS = frozenset({"Qwen3OmniMoeTalkerTextConfig"})
"""Config classes whose model computes from what another model embedded."""
