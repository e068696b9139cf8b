"""A tiny model of a config class, the same each time, and what it is run on."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from plans.errors import UsageError
from runtime.proving.sizes import Sizes, load_sizes

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["tiny_config", "tiny_inputs", "tiny_model"]

# Special tokens inside the tiny vocabulary.
_FORCED: Mapping[str, object] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "use_cache": False}

_BATCH = 2
_FIRST_TOKEN = 3
_IMAGE = (1, 4, 4)
"""One image of 4 by 4 patches."""


def tiny_config(
    module: str, class_name: str, variant: str = "", sizes: Sizes | None = None, tp: int = 1, ep: int = 1
) -> PreTrainedConfig:
    """Build a config class with every size cut down that is larger than the table of sizes says.

    Args:
        module: the dotted name of the class's module.
        class_name: the class.
        variant: another shape of the class, as the sizes name it.
        sizes: the table, None for migrator's own.
        tp, ep: what must divide the sizes that these axes divide.

    Raises:
        UsageError: the sizes have no such variant.
    """
    sizes = sizes or load_sizes()
    config_class = getattr(import_module(module), class_name)
    variants = sizes.variants.get(class_name, {})
    if variant and variant not in variants:
        raise UsageError(
            f"{class_name} has no variant {variant!r}",
            hint=f"known are {', '.join(variants) or 'none'}; --sizes adds others",
            variant=variant,
        )
    defaults = _read_defaults(config_class)
    forced = {name: value for name, value in _FORCED.items() if name in defaults}
    shrunk = {name: size for name, size in sizes.largest.items() if _is_larger(defaults.get(name), size)}
    if "kv_lora_rank" in defaults and "num_key_value_heads" in shrunk:
        # Latent attention has no groups of heads.
        shrunk["num_key_value_heads"] = sizes.largest["num_attention_heads"]
    own = {**sizes.classes.get(class_name, {}), **variants.get(variant, {})}
    values = {**forced, **shrunk, **own}
    fitting = _fit_mesh(module, {**defaults, **values}, sizes, tp, ep) if max(tp, ep) > 1 else {}
    config: PreTrainedConfig = config_class(**{**values, **fitting})
    return config


def tiny_model(config: PreTrainedConfig, dtype: torch.dtype, seed: int = 0) -> PreTrainedModel:
    """Build a config's causal language model, or else the model of that config, with the same weights each time.

    Biases and norms begin as zeros and ones, with which many a mistake would not show, and some classes leave matrices
    uninitialised; so all of them are drawn anew.
    """
    for part in ("_attn_implementation", "_experts_implementation"):
        setattr(config, part, "eager")
    torch.manual_seed(seed)
    model: PreTrainedModel = _find_model_class(type(config))(config).eval()
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, dtype=torch.float32)
        parameter.data = 0.2 * noise if parameter.ndim > 1 else parameter.data.float() + 0.1 * noise
    return model.to(dtype)


def tiny_inputs(
    model: PreTrainedModel, dtype: torch.dtype, seed: int = 1, length: int = 16, sizes: Sizes | None = None
) -> dict[str, torch.Tensor]:
    """Return what a model is run on: tokens, or what stands for them where a part of a larger model takes none.

    Args:
        model: the unsharded model.
        dtype: the dtype of inputs that are no tokens.
        seed: their seed.
        length: the length of sequences.
        sizes: the table that says what classes take, None for migrator's own.
    """
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    taken = (sizes or load_sizes()).inputs.get(type(config).__name__)
    if taken == "embeddings":
        return {"inputs_embeds": torch.randn(_BATCH, length, config.hidden_size, generator=generator).to(dtype)}
    if not hasattr(config, "vocab_size"):
        grid = torch.tensor([_IMAGE])
        patches = torch.randn(int(grid.prod()), config.num_channels * config.patch_size**2, generator=generator)
        return {"pixel_values": patches.to(dtype), "grid_thw": grid}
    return {"input_ids": torch.randint(_FIRST_TOKEN, config.vocab_size, (_BATCH, length), generator=generator)}


def _fit_mesh(module: str, values: Mapping[str, object], sizes: Sizes, tp: int, ep: int) -> dict[str, int]:
    """Return the sizes that the axes of a mesh do not divide, enlarged so that they do."""

    def find(kind: str) -> dict[str, int]:
        found = {name: values.get(name) for name in sizes.divided.get(kind, ())}
        return {name: value for name, value in found.items() if isinstance(value, int) and value > 1}

    heads = find("heads")
    factor = tp // math.gcd(tp, *heads.values())
    return {
        **{name: value * factor for name, value in heads.items()},
        **(_keep_head_width(module, values, factor) if factor > 1 else {}),
        **{name: _fill_ranks(value, tp) for name, value in find("rows").items()},
        **{name: math.lcm(value, tp) for name, value in find("tp").items()},
        **{name: math.lcm(value, ep) for name, value in find("ep").items()},
    }


def _keep_head_width(module: str, values: Mapping[str, object], factor: int) -> dict[str, int]:
    """Return what keeps the width of heads whose number grows by a factor, if the class derives it from hidden_size.

    Most models read `head_dim` even where their config class does not declare it; the hidden size grows for the others
    only, because activations grow with it on every rank.
    """
    hidden, count = values.get("hidden_size"), values.get("num_attention_heads")
    has_width = isinstance(values.get("head_dim"), int) or "kv_lora_rank" in values
    if has_width or not isinstance(hidden, int) or not isinstance(count, int):
        return {}
    reads_width = "head_dim" in values or 'getattr(config, "head_dim"' in _read_modeling(module)
    return {"head_dim": hidden // count} if reads_width else {"hidden_size": hidden * factor}


def _read_modeling(module: str) -> str:
    """Return the source of the modeling file beside a config class, empty if there is none."""
    found = find_spec(_name_modeling(module))
    return Path(found.origin).read_text(encoding="utf-8") if found and found.origin else ""


def _name_modeling(module: str) -> str:
    return module.replace("configuration_", "modeling_")


def _fill_ranks(rows: int, ranks: int) -> int:
    """Return the smallest number of rows, not below a given one, of which `torch.chunk` leaves every rank some."""
    while -(-rows // ranks) * (ranks - 1) >= rows:
        rows += 1
    return rows


def _read_defaults(config_class: type) -> dict[str, object]:
    """Return the fields of a config class with their defaults, the class being a dataclass or one with a signature."""
    if dataclasses.is_dataclass(config_class):
        return {field.name: field.default for field in dataclasses.fields(config_class)}
    return {name: parameter.default for name, parameter in inspect.signature(config_class).parameters.items()}


def _is_larger(default: object, size: int) -> bool:
    return isinstance(default, int) and not isinstance(default, bool) and default > size


def _find_model_class(config_class: type[PreTrainedConfig]) -> Callable[[PreTrainedConfig], PreTrainedModel]:
    """Return the causal language model of a config class or of the class it renames, else its base model.

    transformers maps config classes by their names alone, so a copy's name leads to the original's model.
    """
    from transformers import AutoModel, AutoModelForCausalLM, PreTrainedConfig

    for known in config_class.__mro__:
        if not issubclass(known, PreTrainedConfig) or known is PreTrainedConfig:
            continue
        for auto in (AutoModelForCausalLM, AutoModel):
            if known in auto._model_mapping:
                mapped: type[PreTrainedModel] = auto._model_mapping[known]
                if mapped.__module__.partition(".")[0] == known.__module__.partition(".")[0]:
                    return mapped
        if models := _find_own_models(known):
            return next((one for one in models if one.__name__.endswith("ForCausalLM")), models[0])
    raise UsageError(
        f"{config_class.__module__} has no model of {config_class.__name__} beside it",
        hint="set `config_class` on the model's class",
    )


def _find_own_models(config_class: type[PreTrainedConfig]) -> list[type[PreTrainedModel]]:
    """Return the models of a config class in the modeling file beside it."""
    name = _name_modeling(config_class.__module__)
    if find_spec(name) is None:
        return []
    models: list[Any] = [model for _, model in inspect.getmembers(import_module(name), _is_model)]
    return [
        model
        for model in models
        if model.config_class in config_class.__mro__ and not model.__name__.endswith("PreTrainedModel")
    ]


def _is_model(value: object) -> bool:
    from transformers import PreTrainedModel

    return isinstance(value, type) and issubclass(value, PreTrainedModel)
