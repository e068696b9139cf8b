"""The MoE config classes of the installed transformers, each with a tiny config and the model that runs it alone."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from benchmarks.sweep_cases import SHRUNK, SIZES, TAKE_EMBEDDINGS, VARIANTS

__all__ = ["tiny_config", "tiny_inputs", "tiny_model"]

# Special tokens inside the tiny vocabulary.
_FORCED: Mapping[str, object] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "use_cache": False}

_BATCH, _SEQUENCE = 2, 16
_GRID = torch.tensor([[1, 4, 4]])
"""One image of 4 by 4 patches."""


def tiny_config(family: str, class_name: str, variant: str = "") -> PreTrainedConfig:
    """Build a config class with every size that is larger than `SHRUNK` says cut down to it.

    Args:
        family: the models folder, `qwen3_moe`.
        class_name: the class in that folder's configuration file.
        variant: of the class, as `VARIANTS` names it.
    """
    module = import_module(f"transformers.models.{family}.configuration_{family}")
    config_class = getattr(module, class_name)
    defaults = {field.name: field.default for field in dataclasses.fields(config_class)}
    forced = {name: value for name, value in _FORCED.items() if name in defaults}
    shrunk = {name: size for name, size in SHRUNK.items() if _is_larger(defaults.get(name), size)}
    if "kv_lora_rank" in defaults and "num_key_value_heads" in shrunk:
        shrunk["num_key_value_heads"] = SHRUNK["num_attention_heads"]  # latent attention has no groups of heads
    own = {**SIZES.get(class_name, {}), **(VARIANTS[class_name][variant] if variant else {})}
    config: PreTrainedConfig = config_class(**{**forced, **shrunk, **own})
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    return config


def tiny_model(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Build a config's causal language model, or else the model of that config, with the same weights each time.

    Biases and norms begin as zeros and ones, with which many a mistake would not show, and some classes leave matrices
    uninitialised; so all of them are drawn anew.
    """
    torch.manual_seed(0)
    model: PreTrainedModel = _model_class(type(config))(config).eval()
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, dtype=torch.float32)
        parameter.data = 0.2 * noise if parameter.ndim > 1 else parameter.data.float() + 0.1 * noise
    return model.to(dtype)


def tiny_inputs(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return what a model is run on: tokens, or what stands for them where a part of a larger model takes none."""
    generator = torch.Generator().manual_seed(1)
    config = model.config
    if not hasattr(config, "vocab_size"):
        patches = torch.randn(int(_GRID.prod()), config.num_channels * config.patch_size**2, generator=generator)
        return {"pixel_values": patches.to(dtype), "grid_thw": _GRID}
    if type(config).__name__ in TAKE_EMBEDDINGS:
        return {"inputs_embeds": torch.randn(_BATCH, _SEQUENCE, config.hidden_size, generator=generator).to(dtype)}
    return {"input_ids": torch.randint(3, config.vocab_size, (_BATCH, _SEQUENCE), generator=generator)}


def _is_larger(default: object, size: int) -> bool:
    return isinstance(default, int) and not isinstance(default, bool) and default > size


def _model_class(config_class: type[PreTrainedConfig]) -> Any:
    """Return the causal language model of a config class or of the class it renames, else its base model."""
    for auto in (AutoModelForCausalLM, AutoModel):
        for known in config_class.__mro__:
            if known in auto._model_mapping:
                return auto._model_mapping[known]
    modeling = import_module(config_class.__module__.replace(".configuration_", ".modeling_"))
    models = [
        model
        for name, model in inspect.getmembers(modeling, inspect.isclass)
        if issubclass(model, PreTrainedModel)
        and model.config_class in config_class.__mro__
        and not name.endswith("PreTrainedModel")
    ]
    return next((model for model in models if model.__name__.endswith("ForCausalLM")), models[0])
