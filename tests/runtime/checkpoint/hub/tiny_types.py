"""A tiny model of every type and class that transformers' conversion mapping speaks of, sizes cut down by field."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import transformers
from transformers.conversion_mapping import _build_checkpoint_conversion_mapping
from transformers.models.auto import modeling_auto

from runtime.proving.sizes import load_sizes

__all__ = ["UNBUILT", "model_classes", "tiny_type"]

_LIMITS: Mapping[str, int] = {
    **dict.fromkeys(("d_model", "dim", "embed_dim", "n_embd", "out_hidden_size", "output_dim"), 32),
    **dict.fromkeys(("decoder_hidden_size", "encoder_hidden_size", "feature_size", "mm_hidden_size"), 32),
    **dict.fromkeys(("codebook_size", "image_size", "text_hidden_size", "vision_hidden_size"), 32),
    **dict.fromkeys(("encoder_hidden_dim", "encoder_in_channels", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("d_ff", "decoder_ffn_dim", "encoder_ffn_dim", "encoder_intermediate_size", "ffn_dim"), 48),
    **dict.fromkeys(("hidden_dim", "mlp_dim"), 48),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("decoder_layers", "decoder_num_hidden_layers", "depth", "encoder_layers", "n_layer"), 2),
    **dict.fromkeys(("n_layers", "num_decoder_layers", "num_encoder_layers", "num_global_layers"), 2),
    **dict.fromkeys(("num_mel_bins", "num_position_embeddings", "projection_dim"), 16),
    **dict.fromkeys(("max_source_positions", "max_target_positions", "vision_output_dim"), 64),
    "audio_hidden_size": 32,
    "d_kv": 8,
    "mm_tokens_per_image": 4,
    "moe_num_shared_experts": 1,
    "num_image_tokens": 4,
    "num_queries": 8,
    "unpadded_vocab_size": 97,
    **load_sizes().largest,
}
"""Upper bounds by field, wherever in a config it stands."""

_RESNET = {
    "encoder_attention_heads": 8,
    "decoder_attention_heads": 8,
    "use_timm_backbone": False,
    "backbone": None,
    "use_pretrained_backbone": False,
    "backbone_config": {
        "model_type": "resnet",
        "embedding_size": 8,
        "hidden_sizes": [8] * 4,
        "depths": [1] * 4,
        "out_features": ["stage1", "stage2", "stage3", "stage4"],
    },
}
_SIZES: Mapping[str, Mapping[str, object]] = {
    **{name: sizes for name, sizes in load_sizes().classes.items() if name != "UnlimitedOcrTextConfig"},
    "BeitConfig": {"out_indices": [1, 2, 3, 4]},
    "ConditionalDetrConfig": _RESNET,
    "Cosmos3EdgeTextConfig": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    },
    "DFineConfig": {"decoder_layers": 6},
    "DeformableDetrConfig": _RESNET,
    "DetrConfig": _RESNET,
    "Dots3NoteAudioConfig": {"adapter_input_size": 32},
    "Emu3Config": {"vocabulary_map": {"<image>": 5}},
    "Emu3VQVAEConfig": {"base_channels": 32},
    "EsmConfig": {"vocab_size": 33},
    "Gemma3nTextConfig": {"num_kv_shared_layers": 0},
    "GradiumPhononTTSFlowHeadConfig": {"condition_dim": 32},
    "HunYuanVLTextConfig": load_sizes().classes["HunYuanMoEV1Config"],
    "LwDetrViTConfig": {"image_size": 64},
    "MaskFormerSwinConfig": {"num_heads": [2, 4, 4, 8]},
    "MimiConfig": {"upsample_groups": 32},
    "Molmo2AdapterConfig": {"vision_feature_layer": [3, 1]},
    "RadioConfig": {"video_temporal_patch_size": 2},
    "Sapiens2HeadConfig": {
        "upsample_out_channels": [8],
        "upsample_kernel_sizes": [4],
        "conv_out_channels": [8],
        "conv_kernel_sizes": [1],
        "scale_conv_out_channels": [8],
        "scale_conv_kernel_sizes": [1],
        "scale_final_hidden_sizes": [8, 8],
    },
    "SwinConfig": {"num_heads": [2, 4, 4, 8]},
    "VibeVoiceAcousticTokenizerEncoderConfig": {"num_filters": 2},
}
"""By config class: what its tiny config needs besides."""

UNBUILT: Mapping[str, str] = {
    **dict.fromkeys(
        ("Dots3NoteForConditionalGeneration", "Dots3NoteModel", "Dots3NoteTextModel"), "80 million elements"
    ),
    **dict.fromkeys(("inkling_mm_model", "maskformer"), "needs scipy"),
    "d_fine": "tiny sizes do not go together",
    "gradium_phonon_tts": "transformers does not load what it saved",
    "nemo_speechlm": "transformers does not load what it saved",
    "qwen3_omni_moe": "its talker's config lacks what its model asks for",
    "t5gemma2_encoder": "a part whose config lacks what its model asks for",
    "timm_wrapper": "needs timm",
}
"""Keys of the mapping whose models are not built here, each with the reason."""

_AUTO = ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES")


def model_classes() -> dict[str, type[transformers.PreTrainedModel]]:
    """Return a class for every key of the mapping, classes that are only parts of others left out."""
    return {key: found for key in _build_checkpoint_conversion_mapping() if (found := _model_class(key)) is not None}


def tiny_type(key: str) -> transformers.PreTrainedModel:
    """Return a tiny model with random values, the same each time, norms and biases included."""
    model_class = model_classes()[key]
    config = model_class.config_class(**_shrunk(model_class.config_class()))
    config._attn_implementation = config._experts_implementation = "eager"
    torch.manual_seed(0)
    model = model_class(config)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.normal_()
    return model


def _shrunk(default: transformers.PreTrainedConfig) -> dict[str, object]:
    """Return the fields of a config, and of those inside it, that a tiny one sets."""
    fields = dict(_fields(default))
    if "kv_lora_rank" in vars(default) and "num_key_value_heads" in fields:
        fields["num_key_value_heads"] = _LIMITS["num_attention_heads"]  # latent attention has no groups of heads
    known = next((kind.__name__ for kind in type(default).__mro__ if kind.__name__ in _SIZES), "")
    return fields | dict(_SIZES.get(known, {}))


def _fields(default: transformers.PreTrainedConfig) -> Iterator[tuple[str, object]]:
    for name, value in vars(default).items():
        if isinstance(value, transformers.PreTrainedConfig):
            yield name, {**_shrunk(value), "model_type": value.model_type}
        elif name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            yield name, {"pad": 0, "bos": 1, "eos": 2}[name[:3]]
        elif not isinstance(value, int) or isinstance(value, bool):
            continue
        elif name.endswith(("_token_id", "_token_index")) and value > 100:
            yield name, 5
        elif value > _LIMITS.get(name, value):
            yield name, _LIMITS[name]


def _model_class(key: str) -> type[transformers.PreTrainedModel] | None:
    """Return the class of a name, or the one that is saved most fully of a model type."""
    tables = [name for name in dir(modeling_auto) if name.startswith("MODEL_") and name.endswith("MAPPING_NAMES")]
    names = [key, *(getattr(modeling_auto, table).get(key) for table in (*_AUTO, *tables))]
    for name in names:
        found = getattr(transformers, name if isinstance(name, str) else (name or ("",))[0], None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    return None
