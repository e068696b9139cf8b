"""Tiny configs of models that take more than text, or return something else than text: each a real family."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from tests.tiny_models import DENSE, with_noise

_TEXT = {**DENSE, "num_hidden_layers": 2, "head_dim": 8}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}
_BERT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 101,
    "max_position_embeddings": 64,
}

MULTIMODAL: dict[str, tuple[str, str, dict[str, Any]]] = {
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"vocab_size": 101, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
        | {"decoder_start_token_id": 0, "pad_token_id": 0},
    ),
    "whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {"vocab_size": 101, "num_mel_bins": 8, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2}
        | {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
        | {"max_source_positions": 20, "max_target_positions": 64, "pad_token_id": 0, "bos_token_id": 1}
        | {"eos_token_id": 2, "decoder_start_token_id": 3},
    ),
    "qwen3_vl_moe": (
        "Qwen3VLMoeForConditionalGeneration",
        "Qwen3VLMoeConfig",
        {
            "text_config": {**_TEXT, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
            | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}},
            "vision_config": {"hidden_size": 32, "intermediate_size": 48, "depth": 2, "num_heads": 4, "patch_size": 4}
            | {"out_hidden_size": 32, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
            | {"spatial_merge_size": 2, "temporal_patch_size": 2},
            "image_token_id": 90,
            "video_token_id": 91,
            "vision_start_token_id": 92,
            "vision_end_token_id": 93,
        },
    ),
    "gemma4": (
        "Gemma4ForConditionalGeneration",
        "Gemma4Config",
        {
            "text_config": {**_TEXT, "num_hidden_layers": 4, "global_head_dim": 8, "num_global_key_value_heads": 4}
            | {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 8}
            | {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 101, "num_kv_shared_layers": 2},
            "vision_config": _VISION | {"head_dim": 8, "position_embedding_size": 32, "pooling_kernel_size": 2},
            "audio_config": None,
            "image_token_id": 90,
            "video_token_id": 91,
            "audio_token_id": 92,
        },
    ),
    "gemma3": (
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        {
            "text_config": {**_TEXT, "sliding_window": 8},
            "vision_config": _VISION | {"vision_use_head": False},
            "mm_tokens_per_image": 4,
            "image_token_index": 90,
            "boi_token_index": 91,
            "eoi_token_index": 92,
        },
    ),
    "mistral3": (
        "Mistral3ForConditionalGeneration",
        "Mistral3Config",
        {
            "text_config": {**_TEXT, "model_type": "mistral"},
            "vision_config": _VISION | {"model_type": "pixtral", "head_dim": 8},
            "vision_feature_layer": -1,
            "image_token_index": 90,
        },
    ),
    "bert": ("BertModel", "BertConfig", _BERT),
    "bert_classifier": ("BertForSequenceClassification", "BertConfig", _BERT | {"num_labels": 3}),
    "qwen3_moe_base": (
        "Qwen3MoeModel",
        "Qwen3MoeConfig",
        _TEXT | {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    ),
    "llama_classifier": ("LlamaForSequenceClassification", "LlamaConfig", DENSE | {"num_labels": 3}),
    "vit_classifier": ("ViTForImageClassification", "ViTConfig", _VISION | {"num_labels": 3}),
    "wav2vec2": (
        "Wav2Vec2ForCTC",
        "Wav2Vec2Config",
        _BERT | {"conv_dim": [16, 16], "conv_stride": [4, 2], "conv_kernel": [4, 2], "num_feat_extract_layers": 2}
        | {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2},
    ),
}  # fmt: skip


def multimodal_config(name: str) -> Any:
    """Return a tiny config, with the class to build."""
    architecture, config, sizes = MULTIMODAL[name]
    found = getattr(transformers, config)(**sizes, architectures=[architecture])
    found.dtype = torch.float32
    found._attn_implementation = "eager"
    found._experts_implementation = "eager"
    return found


def multimodal_model(name: str, seed: int = 0) -> Any:
    """Return a tiny model with random weights, the same for the same seed."""
    torch.manual_seed(seed)
    config = multimodal_config(name)
    return with_noise(getattr(transformers, MULTIMODAL[name][0])(config)).eval()
